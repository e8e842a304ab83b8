//! How long a command will take: one line on standard error before it begins, and times as people say them.
//!
//! A forecast is made of the sizes that the command was given and of times that its steps took on a small machine, so
//! it says seconds from minutes and no more. Standard output, JSON or not, has the results alone.

use std::io::Write;
use std::time::Duration;

/// Says how long `what` takes, on one line of standard error.
pub fn announce(program: &str, what: &str, time: Duration) {
    // In one piece; without a reader there is nobody to tell.
    let _ = std::io::stderr().write_all(line(program, what, time).as_bytes());
}

fn line(program: &str, what: &str, time: Duration) -> String {
    format!("{program}: {what} takes {}\n", about(time))
}

/// A time that is a guess: "about 40 s".
#[must_use]
pub fn about(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds.round() as u64 {
        0..2 => "some seconds".to_owned(),
        rounded @ 2..20 => format!("about {rounded} s"),
        20..90 => format!("about {} s", (seconds / 10.0).round() as u64 * 10),
        _ => format!("about {} min", (seconds / 60.0).round() as u64),
    }
}

/// A time that was measured: tenths of short ones, no fractions of long ones.
#[must_use]
pub fn span(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_is_one_line_and_no_more_exact_than_it_can_be() {
        let text = |seconds| about(Duration::from_secs(seconds));
        assert_eq!([text(0), text(3), text(19)], ["some seconds", "about 3 s", "about 19 s"]);
        assert_eq!(
            [text(37), text(88), text(97), text(1800)],
            ["about 40 s", "about 90 s", "about 2 min", "about 30 min"]
        );
        assert_eq!(line("llfree-vmm", "the demo", Duration::from_secs(11)), "llfree-vmm: the demo takes about 11 s\n");
    }

    #[test]
    fn times_are_as_exact_as_they_are_short() {
        let text = |millis| span(Duration::from_millis(millis));
        assert_eq!([text(40), text(9400), text(9600)], ["0.0 s", "9.4 s", "10 s"]);
        assert_eq!([text(61_000), text(149_600), text(3_600_000)], ["61 s", "2 min 30 s", "60 min 0 s"]);
    }
}
