//! Where rows go: a table or JSON on the standard output, a CSV file, a picture. Nothing else is ever
//! written to the standard output.

use crate::error::BenchError;
use crate::plot::{self, Panel};
use crate::series::{self, Table};
use clap::Args;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct Output {
    /// Print one JSON array of rows
    #[arg(long)]
    pub(crate) json: bool,
    /// Also write the rows to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Picture {
    /// Also draw the rows into this file
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

/// Outputs besides the standard output. Opened before the first round: a file that cannot be
/// written should not cost minutes of measuring first.
pub(crate) struct Files {
    csv: Option<(File, String)>,
    plot: Option<(File, String)>,
}

impl Files {
    pub(crate) fn open(output: &Output, picture: Option<&Picture>) -> Result<Self, BenchError> {
        let create = |path: Option<&PathBuf>| {
            path.map(|path| {
                let name = path.display().to_string();
                let file = File::create(path);
                file.map_err(|error| BenchError::File { path: name.clone(), source: error.into() })
                    .map(|file| (file, name))
            })
            .transpose()
        };
        Ok(Self { csv: create(output.csv.as_ref())?, plot: create(picture.and_then(|picture| picture.plot.as_ref()))? })
    }

    pub(crate) fn draw(&self, title: &str, panels: &[Panel]) -> Result<(), BenchError> {
        let Some((file, path)) = &self.plot else { return Ok(()) };
        let svg = plot::draw(title, panels, 3).map_err(|error| BenchError::Plot(error.to_string()))?;
        let mut file = file;
        file.write_all(svg.as_bytes()).map_err(|error| BenchError::File { path: path.clone(), source: error.into() })
    }

    pub(crate) fn write<R: Table>(self, rows: &[R], output: &Output) -> Result<(), BenchError> {
        self.write_as(rows, output, None)
    }

    /// The same with another text than the table.
    pub(crate) fn write_as<R: Table>(
        self,
        rows: &[R],
        output: &Output,
        text: Option<String>,
    ) -> Result<(), BenchError> {
        if let Some((file, path)) = self.csv {
            series::write_csv(rows, file).map_err(|source| BenchError::File { path, source })?;
        }
        if output.json {
            print(&(serde_json::to_string_pretty(rows).map_err(std::io::Error::from)? + "\n"))
        } else {
            print(&text.unwrap_or_else(|| R::table(rows)))
        }
    }
}

pub(crate) fn print(text: &str) -> Result<(), BenchError> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}
