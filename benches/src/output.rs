//! Where rows go: a table, CSV or JSON on the standard output, a CSV file, a picture. Nothing else is ever
//! written to the standard output.
//!
//! Files are replaced at the end, in one step: whoever is interrupted, killed or out of disk space keeps the
//! results of the last time.

use crate::error::BenchError;
use crate::interrupt;
use crate::plot::{self, Panel};
use crate::series::{self, Table};
use clap::Args;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The name that stands for the standard output.
const STDOUT: &str = "-";

#[derive(Args)]
pub(crate) struct Output {
    /// Print one JSON array of rows
    #[arg(long)]
    pub(crate) json: bool,
    /// Also write the rows to this file; - prints them instead of the table
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Picture {
    /// Also draw the rows into this file
    #[arg(long, value_name = "FILE.svg", value_parser = svg_path)]
    pub(crate) plot: Option<PathBuf>,
}

/// Pictures are SVG, whatever the file is called; so a name that says otherwise is a mistake.
fn svg_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if text == STDOUT {
        return Err("a picture needs a file; write a name that ends in .svg".to_owned());
    }
    match path.extension() {
        Some(extension) if !extension.eq_ignore_ascii_case("svg") => {
            Err("pictures are SVG; write a name that ends in .svg".to_owned())
        }
        _ => Ok(path),
    }
}

/// Outputs besides the table. Tried before the first round: a file that cannot be written should not cost
/// minutes of measuring first.
pub(crate) struct Files {
    csv: Option<Target>,
    plot: Option<Target>,
}

impl Files {
    pub(crate) fn open(output: &Output, picture: Option<&Picture>) -> Result<Self, BenchError> {
        let csv = output.csv.as_deref();
        if output.json && csv == Some(Path::new(STDOUT)) {
            return Err(BenchError::OneStdout);
        }
        let plot = picture.and_then(|picture| picture.plot.as_deref());
        Ok(Self { csv: csv.map(Target::open).transpose()?, plot: plot.map(Target::open).transpose()? })
    }

    /// Puts the rows where they belong; `draw` gives the title and the panels of the picture.
    ///
    /// Rows of a figure that was interrupted are printed only.
    pub(crate) fn publish<R: Table>(
        self,
        rows: Vec<R>,
        output: &Output,
        draw: impl FnOnce(&[R]) -> (String, Vec<Panel>),
    ) -> Result<(), BenchError> {
        self.publish_as(rows, output, None, draw)
    }

    /// The same with another text than the table.
    pub(crate) fn publish_as<R: Table>(
        self,
        mut rows: Vec<R>,
        output: &Output,
        text: Option<fn(&[R]) -> String>,
        draw: impl FnOnce(&[R]) -> (String, Vec<Panel>),
    ) -> Result<(), BenchError> {
        let interrupted = interrupt::requested();
        if interrupted {
            rows.retain(R::is_measured);
        } else {
            if let Some(target) = &self.plot {
                let (title, panels) = draw(&rows);
                let svg = plot::draw(&title, &panels, 3).map_err(|error| BenchError::Plot(error.to_string()))?;
                target.write(svg.as_bytes())?;
            }
            if let Some(target) = &self.csv
                && !matches!(target, Target::Stdout)
            {
                target.write(&series::csv(&rows)?)?;
            }
        }
        if output.json {
            print((serde_json::to_string_pretty(&rows).map_err(io::Error::from)? + "\n").as_bytes())?;
        } else if let Some(Target::Stdout) = self.csv {
            print(&series::csv(&rows)?)?;
        } else {
            print(text.unwrap_or(R::table)(&rows).as_bytes())?;
        }
        if interrupted { Err(BenchError::Interrupted) } else { Ok(()) }
    }

    /// The same for a figure without a picture.
    pub(crate) fn publish_rows<R: Table>(self, rows: Vec<R>, output: &Output) -> Result<(), BenchError> {
        self.publish(rows, output, |_| Default::default())
    }
}

/// One output.
enum Target {
    Stdout,
    /// A file, to be replaced.
    File(PathBuf),
    /// A pipe or a device, which cannot be.
    Stream(PathBuf),
}

impl Target {
    fn open(path: &Path) -> Result<Self, BenchError> {
        if path == Path::new(STDOUT) {
            return Ok(Self::Stdout);
        }
        // Where a link leads: the link stays.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let target = match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => return Err(refused(&path)(io::ErrorKind::IsADirectory.into())),
            Ok(meta) if !meta.is_file() => Self::Stream(path),
            Ok(_) => {
                // Replacing it needs the directory only, but a file that is not to be written stays.
                OpenOptions::new().write(true).open(&path).map_err(refused(&path))?;
                Self::File(path)
            }
            Err(_) => Self::File(path),
        };
        if let Self::File(path) = &target {
            Draft::create(path).map_err(refused(path))?;
        }
        Ok(target)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), BenchError> {
        match self {
            Self::Stdout => print(bytes),
            Self::Stream(path) => {
                OpenOptions::new().write(true).open(path).and_then(|mut to| to.write_all(bytes)).map_err(refused(path))
            }
            Self::File(path) => Draft::create(path).and_then(|draft| draft.replace(path, bytes)).map_err(refused(path)),
        }
    }
}

fn refused(path: &Path) -> impl FnOnce(io::Error) -> BenchError {
    let path = path.display().to_string();
    move |source| BenchError::File { path, source }
}

/// A file beside the one that it is to replace; removed unless it does.
struct Draft {
    path: PathBuf,
    file: File,
}

impl Draft {
    fn create(target: &Path) -> io::Result<Self> {
        let mut name = std::ffi::OsString::from(".");
        name.push(target.file_name().ok_or(io::ErrorKind::InvalidInput)?);
        name.push(format!(".{}", std::process::id()));
        let path = target.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Self { path, file })
    }

    fn replace(mut self, target: &Path, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        if let Ok(meta) = fs::metadata(target) {
            self.file.set_permissions(meta.permissions())?;
        }
        // The name must not lead to a file whose bytes are still to come.
        self.file.sync_all()?;
        fs::rename(&self.path, target)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Gone already, if it took the other's place.
        let _ = fs::remove_file(&self.path);
    }
}

pub(crate) fn print(text: &[u8]) -> Result<(), BenchError> {
    match io::stdout().write_all(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        let path = scratch.path().join("rows.csv");
        fs::write(&path, "old").expect("scratch");
        let target = Target::open(&path).expect("it can be written");
        assert_eq!(fs::read_to_string(&path).expect("it is there"), "old", "opening costs nothing");
        let mut reader = File::open(&path).expect("it is there");
        target.write(b"new").expect("scratch");
        assert_eq!(fs::read_to_string(&path).expect("it is there"), "new");
        assert_eq!(io::read_to_string(&mut reader).expect("open"), "old", "the old file is as it was, in each moment");
        let files = fs::read_dir(scratch.path()).expect("scratch").count();
        assert_eq!(files, 1, "no draft is left");
    }

    #[test]
    fn what_cannot_be_written_is_known_at_once() {
        let scratch = tempfile::tempdir().expect("a scratch directory");
        for path in [scratch.path().to_owned(), scratch.path().join("no/such/rows.csv")] {
            assert!(Target::open(&path).is_err(), "{}", path.display());
        }
        assert!(matches!(Target::open(Path::new("/dev/null")), Ok(Target::Stream(_))));
        assert!(matches!(Target::open(Path::new("-")), Ok(Target::Stdout)));
    }

    #[test]
    fn a_picture_is_svg_by_its_name() {
        assert!(svg_path("a.svg").is_ok() && svg_path("b.SVG").is_ok() && svg_path("/dev/null").is_ok());
        for name in ["x.png", "x.svg.pdf", "-"] {
            assert!(svg_path(name).expect_err(name).contains(".svg"), "{name}");
        }
    }
}
