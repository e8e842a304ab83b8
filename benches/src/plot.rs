//! Panels of lines, drawn as one SVG file with the legend below.
//!
//! Only the SVG backend of the plotting library is used: text stays text, so no font is loaded.
//! A colour belongs to an allocator, whatever else is in the picture.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;
use std::error::Error;

/// A panel's size, and the strip below all panels that holds the legend.
const PANEL: (u32, u32) = (440, 320);
const TITLE: u32 = 40;
const LEGEND_LINE: u32 = 26;
/// Entries of the legend next to each other.
const LEGEND_COLUMNS: u32 = 4;

/// One diagram.
#[derive(Clone, Default, Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) x_label: &'static str,
    pub(crate) y_label: &'static str,
    pub(crate) log_y: bool,
    /// Names for x = 0, 1, 2 ...; numbers if there are none.
    pub(crate) x_names: Vec<String>,
    pub(crate) lines: Vec<Line>,
}

/// One line of a diagram.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    name: String,
    colour: RGBColor,
    dashed: bool,
    points: Vec<(f64, f64)>,
}

impl Line {
    /// A thin line to compare with.
    pub(crate) fn guide(name: &str, ends: [(f64, f64); 2]) -> Self {
        Self { name: name.to_owned(), colour: RGBColor(150, 150, 150), dashed: true, points: ends.to_vec() }
    }
}

impl Panel {
    /// Adds a point to the line of that name.
    pub(crate) fn point(&mut self, name: String, allocator: &str, dashed: bool, point: (f64, f64)) {
        match self.lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => self.lines.push(Line { name, colour: colour(allocator), dashed, points: vec![point] }),
        }
    }

    /// The smallest and the largest x.
    pub(crate) fn x_range(&self) -> (f64, f64) {
        range(self.lines.iter().flat_map(|line| &line.points).map(|point| point.0))
    }

    fn y_range(&self) -> (f64, f64) {
        range(self.lines.iter().flat_map(|line| &line.points).map(|point| point.1))
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
}

/// Colours that stay apart for most kinds of colour blindness (Okabe and Ito).
fn colour(name: &str) -> RGBColor {
    match name {
        "llfree" | "p50" => RGBColor(0, 114, 178),
        "llfree-shared" | "balloon-joined" => RGBColor(86, 180, 233),
        "buddy" | "balloon" | "p99.9" => RGBColor(213, 94, 0),
        "buddy-spin" | "balloon-huge" | "p99" => RGBColor(230, 159, 0),
        "per-core" | "virtio-mem" => RGBColor(0, 158, 115),
        "queue" | "balloon-huge-joined" => RGBColor(204, 121, 167),
        _ => RGBColor(60, 60, 60),
    }
}

/// The SVG text of a picture of panels, `columns` next to each other.
pub(crate) fn draw(title: &str, panels: &[Panel], columns: u32) -> Result<String, Box<dyn Error>> {
    let columns = columns.clamp(1, panels.len().max(1) as u32);
    let rows = (panels.len() as u32).div_ceil(columns);
    let mut legend: Vec<&Line> = Vec::new();
    for line in panels.iter().flat_map(|panel| &panel.lines) {
        if legend.iter().all(|known| known.name != line.name) {
            legend.push(line);
        }
    }
    let legend_columns = LEGEND_COLUMNS.min(columns * 2);
    let legend_height = (legend.len() as u32).div_ceil(legend_columns) * LEGEND_LINE + 10;
    let size = (PANEL.0 * columns, TITLE + PANEL.1 * rows + legend_height);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(title.to_owned(), (16, 12), ("sans-serif", 20)))?;
        let (_, below) = root.split_vertically(TITLE);
        let (grid, strip) = below.split_vertically(PANEL.1 * rows);
        for (area, panel) in grid.split_evenly((rows as usize, columns as usize)).iter().zip(panels) {
            draw_panel(area, panel)?;
        }
        for (i, line) in legend.iter().enumerate() {
            let width = size.0 / legend_columns;
            let (column, row) = (i as u32 % legend_columns, i as u32 / legend_columns);
            let x = (column * width + 24) as i32;
            let y = (row * LEGEND_LINE + 12) as i32;
            if line.dashed {
                for dash in [0, 13, 26] {
                    let ends = vec![(x + dash, y), (x + dash + 8, y)];
                    strip.draw(&PathElement::new(ends, line.colour.stroke_width(2)))?;
                }
            } else {
                let ends = vec![(x, y), (x + 36, y)];
                strip.draw(&PathElement::new(ends, line.colour.stroke_width(3)))?;
            }
            strip.draw(&Text::new(line.name.clone(), (x + 44, y - 7), ("sans-serif", 15)))?;
        }
        root.present()?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw_panel(area: &Area<'_>, panel: &Panel) -> Result<(), Box<dyn Error>> {
    let (x_low, x_high) = panel.x_range();
    let (y_low, y_high) = panel.y_range();
    if !(x_low.is_finite() && y_low.is_finite()) {
        return Ok(());
    }
    let margin = if x_high > x_low { (x_high - x_low) * 0.03 } else { 0.5 };
    let x = x_low - margin..x_high + margin;
    let mut chart = ChartBuilder::on(area);
    chart
        .margin(10)
        .margin_right(20)
        .caption(&panel.title, ("sans-serif", 16))
        .x_label_area_size(40)
        .y_label_area_size(58);
    if panel.log_y {
        let y = (y_low / 1.4).max(0.1)..y_high * 1.4;
        draw_lines(chart.build_cartesian_2d(x, y.log_scale())?, panel)
    } else {
        draw_lines(chart.build_cartesian_2d(x, 0.0..y_high.max(1.0) * 1.05)?, panel)
    }
}

fn draw_lines<Y>(
    mut chart: ChartContext<'_, SVGBackend<'_>, Cartesian2d<plotters::coord::types::RangedCoordf64, Y>>,
    panel: &Panel,
) -> Result<(), Box<dyn Error>>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let (low, high) = panel.x_range();
    let x_name = |x: &f64| {
        // Between two orders or thread counts there is nothing to name.
        if x.fract().abs() > 1e-6 || *x < low || *x > high {
            return String::new();
        }
        panel.x_names.get(*x as usize).cloned().unwrap_or_else(|| format!("{x:.0}"))
    };
    chart
        .configure_mesh()
        .x_desc(panel.x_label)
        .y_desc(panel.y_label)
        .x_labels(12)
        .x_label_formatter(&x_name)
        .y_label_formatter(&|y| if *y < 10.0 && y.fract() > 1e-6 { format!("{y:.1}") } else { format!("{y:.0}") })
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .draw()?;
    for line in &panel.lines {
        let points = line.points.iter().copied();
        if line.dashed {
            chart.draw_series(DashedLineSeries::new(points, 6, 4, line.colour.stroke_width(2)))?;
        } else {
            chart.draw_series(LineSeries::new(points, line.colour.stroke_width(3)))?;
        }
        // A line of many points needs no marks; one of a single point is nothing else.
        if line.points.len() <= 12 && line.colour != RGBColor(150, 150, 150) {
            chart.draw_series(line.points.iter().map(|point| Circle::new(*point, 3, line.colour.filled())))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_names_its_panels_and_lines() {
        let mut panel = Panel { title: "bulk: alloc".into(), log_y: true, ..Panel::default() };
        panel.point("llfree".into(), "llfree", false, (0.0, 2.5));
        panel.point("llfree".into(), "llfree", false, (9.0, 25.0));
        panel.point("queue".into(), "queue", true, (0.0, 4.0));
        let empty = Panel { title: "nothing".into(), ..Panel::default() };
        let svg = draw("costs", &[panel, empty], 2).expect("strings are writable");
        for text in ["costs", "bulk: alloc", "llfree", "queue"] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn a_single_point_is_a_picture_too() {
        let mut panel = Panel::default();
        panel.point("llfree".into(), "llfree", false, (1.0, 0.0));
        assert!(draw("one", &[panel], 3).expect("strings are writable").contains("circle"));
    }
}
