//! [`Canvas`]: ratatui's cells on a terminal, with the sequences of termion.
//!
//! `ratatui-termion` does the same for all of ratatui; its macros take longer to compile than the rest of this screen.

use ratatui_core::backend::{Backend, ClearType, WindowSize};
use ratatui_core::buffer::Cell;
use ratatui_core::layout::{Position, Size};
use ratatui_core::style::Modifier;
use std::fmt::{Display, Write as _};
use std::io::{self, Write};
use termion::{clear, cursor, screen, style};

/// Back.
pub(super) fn leave() -> String {
    format!("{}{}{}", style::Reset, cursor::Show, screen::ToMainScreen)
}

/// Collects what a frame writes, and writes it at once.
pub(super) struct Canvas<W> {
    to: W,
    text: String,
    /// Rows and columns, as they are now.
    size: fn() -> (usize, usize),
}

impl<W: Write> Canvas<W> {
    pub(super) fn new(to: W, size: fn() -> (usize, usize)) -> Self {
        Self { to, text: String::new(), size }
    }

    /// Another screen, so that what was there is there again afterwards; no cursor. Whoever has had the terminal meanwhile
    /// may have left that screen, so this is for each time that it comes back.
    pub(super) fn enter(&mut self) {
        self.add(format_args!("{}{}{}", screen::ToAlternateScreen, clear::All, cursor::Hide));
    }

    fn add(&mut self, what: impl Display) {
        // Writing to a String cannot fail.
        let _ = write!(self.text, "{what}");
    }

    fn go_to(&mut self, x: u16, y: u16) {
        self.add(cursor::Goto(x.saturating_add(1), y.saturating_add(1)));
    }
}

impl<W: Write> Backend for Canvas<W> {
    type Error = io::Error;

    fn draw<'a, I: Iterator<Item = (u16, u16, &'a Cell)>>(&mut self, content: I) -> io::Result<()> {
        let (mut next, mut worn) = (None, None);
        for (x, y, cell) in content {
            if next != Some((x, y)) {
                self.go_to(x, y);
            }
            // One column each: names and messages are cut to what is printable, and bars are narrow.
            next = Some((x.saturating_add(1), y));
            if worn.replace(cell.modifier) != Some(cell.modifier) {
                self.add(style::Reset);
                if cell.modifier.contains(Modifier::BOLD) {
                    self.add(style::Bold);
                }
                if cell.modifier.contains(Modifier::REVERSED) {
                    self.add(style::Invert);
                }
            }
            self.add(cell.symbol());
            if !cell.symbol().is_ascii() {
                // Terminals differ in how wide they take some characters to be.
                next = None;
            }
        }
        self.add(style::Reset);
        Ok(())
    }

    fn hide_cursor(&mut self) -> io::Result<()> {
        self.add(cursor::Hide);
        Ok(())
    }

    fn show_cursor(&mut self) -> io::Result<()> {
        self.add(cursor::Show);
        Ok(())
    }

    /// Nobody here asks a terminal anything: its answer would come among the keys.
    fn get_cursor_position(&mut self) -> io::Result<Position> {
        Ok(Position::ORIGIN)
    }

    fn set_cursor_position<P: Into<Position>>(&mut self, position: P) -> io::Result<()> {
        let Position { x, y } = position.into();
        self.go_to(x, y);
        Ok(())
    }

    fn clear(&mut self) -> io::Result<()> {
        self.add(clear::All);
        Ok(())
    }

    fn clear_region(&mut self, _: ClearType) -> io::Result<()> {
        self.clear()
    }

    fn size(&self) -> io::Result<Size> {
        let (rows, columns) = (self.size)();
        // A terminal may say anything; a screen of a million cells is enough.
        let bounded = |number: usize| u16::try_from(number).unwrap_or(u16::MAX).min(1000);
        Ok(Size { width: bounded(columns), height: bounded(rows) })
    }

    fn window_size(&mut self) -> io::Result<WindowSize> {
        Ok(WindowSize { columns_rows: self.size()?, pixels: Size::default() })
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.to.write_all(self.text.as_bytes()).and_then(|()| self.to.flush());
        self.text.clear();
        result
    }
}
