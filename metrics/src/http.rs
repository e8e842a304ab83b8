//! The part of HTTP/1.1 that scrapers speak: a request without a body, one answer, the end of the connection.
//!
//! Pure functions over bytes. What a peer sends is bounded by whoever reads it, and nothing of it is kept but which
//! of a few answers it gets.

use crate::text::Format;
use std::fmt::Write;

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// What is answered.
    pub what: What,
    /// Only the head of it.
    pub head_only: bool,
}

/// What is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// The metrics.
    Metrics(Format),
    /// Where they are.
    Index,
    /// An error.
    Refusal(Refusal),
}

/// Why there is no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// No request of HTTP/1.
    BadRequest,
    /// Nothing is there.
    NotFound,
    /// There is nothing to be written to.
    NotAllowed,
    /// A head above the limit.
    TooLarge,
}

impl Refusal {
    const fn status(self) -> &'static str {
        match self {
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::NotAllowed => "405 Method Not Allowed",
            Self::TooLarge => "431 Request Header Fields Too Large",
        }
    }
}

/// Where the head of a request ends, if all of it is there.
#[must_use]
pub fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let crlf = bytes.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4);
    let lf = bytes.windows(2).position(|two| two == b"\n\n").map(|at| at + 2);
    match (crlf, lf) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    }
}

/// What the head of a request asks for.
#[must_use]
pub fn asked(head: &[u8]) -> Asked {
    let refused = |refusal, head_only| Asked { what: What::Refusal(refusal), head_only };
    let Ok(head) = str::from_utf8(head) else { return refused(Refusal::BadRequest, false) };
    let mut lines = head.lines();
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, target, version] = words[..] else { return refused(Refusal::BadRequest, false) };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return refused(Refusal::BadRequest, false);
    }
    let head_only = match method {
        "GET" => false,
        "HEAD" => true,
        _ => return refused(Refusal::NotAllowed, false),
    };
    let path = target.split('?').next().unwrap_or_default();
    match path {
        "/metrics" => Asked { what: What::Metrics(format(lines)), head_only },
        "/" => Asked { what: What::Index, head_only },
        _ => refused(Refusal::NotFound, head_only),
    }
}

/// OpenMetrics for a scraper that names it, else the format that every scraper reads.
fn format<'a>(mut fields: impl Iterator<Item = &'a str>) -> Format {
    let names_it = fields.any(|field| {
        let Some((name, value)) = field.split_once(':') else { return false };
        name.eq_ignore_ascii_case("accept") && value.contains("application/openmetrics-text")
    });
    if names_it { Format::OpenMetrics } else { Format::Prometheus }
}

/// An answer with this body, or its head alone.
#[must_use]
pub fn answer(what: What, body: &str, head_only: bool) -> Vec<u8> {
    let (status, media_type) = match what {
        What::Metrics(format) => ("200 OK", format.media_type()),
        What::Index => ("200 OK", "text/plain; charset=utf-8"),
        What::Refusal(refusal) => (refusal.status(), "text/plain; charset=utf-8"),
    };
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(text, "HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\n", body.len());
    if what == What::Refusal(Refusal::NotAllowed) {
        text.push_str("Allow: GET, HEAD\r\n");
    }
    text.push_str("Connection: close\r\n\r\n");
    if !head_only {
        text.push_str(body);
    }
    text.into_bytes()
}

/// The body of an answer without metrics.
#[must_use]
pub fn body(what: What) -> String {
    match what {
        What::Metrics(_) => String::new(),
        What::Index => "llfree-vmm: metrics are at /metrics\n".to_owned(),
        What::Refusal(refusal) => format!("{}\n", refusal.status()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn what(head: &str) -> What {
        asked(head.as_bytes()).what
    }

    #[test]
    fn a_scraper_gets_the_format_that_it_reads() {
        let prometheus =
            "GET /metrics HTTP/1.1\r\nHost: x\r\naccept: application/openmetrics-text;version=1.0.0,*/*\r\n\r\n";
        assert_eq!(what(prometheus), What::Metrics(Format::OpenMetrics));
        assert_eq!(what("GET /metrics?x=1 HTTP/1.0\r\n\r\n"), What::Metrics(Format::Prometheus));
        assert!(asked(b"HEAD /metrics HTTP/1.1\r\n\r\n").head_only);
        assert_eq!(what("GET / HTTP/1.1\n\n"), What::Index);
    }

    #[test]
    fn nothing_else_is_there() {
        for (head, refusal) in [
            ("POST /metrics HTTP/1.1\r\n\r\n", Refusal::NotAllowed),
            ("GET /etc/passwd HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("GET /metrics/../x HTTP/1.1\r\n\r\n", Refusal::NotFound),
            ("GET http://x/metrics HTTP/1.1\r\n\r\n", Refusal::BadRequest),
            ("GET /metrics\r\n\r\n", Refusal::BadRequest),
            ("GET /metrics HTTP/2\r\n\r\n", Refusal::BadRequest),
            ("{\"version\":1}\n\n", Refusal::BadRequest),
            ("", Refusal::BadRequest),
        ] {
            assert_eq!(what(head), What::Refusal(refusal), "{head}");
        }
        assert_eq!(asked(b"\xff\xfe\r\n\r\n").what, What::Refusal(Refusal::BadRequest));
    }

    #[test]
    fn an_answer_says_how_long_it_is() {
        let text = |what, head_only| String::from_utf8(answer(what, &body(what), head_only)).expect("UTF-8");
        let refusal = What::Refusal(Refusal::NotAllowed);
        assert_eq!(
            text(refusal, false),
            "HTTP/1.1 405 Method Not Allowed\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 23\r\n\
             Allow: GET, HEAD\r\nConnection: close\r\n\r\n405 Method Not Allowed\n"
        );
        assert!(text(refusal, true).ends_with("close\r\n\r\n"));
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\nA: b\r\n\r\nrest"), Some(24));
        assert_eq!(end_of_head(b"GET / HTTP/1.1\n\nrest\r\n\r\n"), Some(16));
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\n\r"), None);
    }
}
