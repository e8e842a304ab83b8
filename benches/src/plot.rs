//! Panels of lines, or of bars where x is a name and not a number, drawn as one SVG file with the legend below.
//!
//! What was not measured (NaN) is left out; on a logarithmic axis so is what is not above 0.
//! Only the SVG backend of the plotting library is used: text stays text, so no font is loaded.
//! A colour belongs to an allocator, whatever else is in the picture.

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use std::error::Error;
use std::ops::Range;

/// A panel's size, and the strip below all panels that holds the legend.
const PANEL: (u32, u32) = (440, 320);
const TITLE: u32 = 40;
const LEGEND_LINE: u32 = 26;
/// Marks on the x axis, less than this many.
const MOST_MARKS: i64 = 12;
/// The part of a name's place that its bars take.
const BARS: f64 = 0.8;
/// The colour of lines to compare with.
const GUIDE: RGBColor = RGBColor(150, 150, 150);
/// Entries of the legend next to each other.
const LEGEND_COLUMNS: u32 = 4;

/// One diagram.
#[derive(Clone, Default, Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) x_label: &'static str,
    pub(crate) y_label: &'static str,
    pub(crate) log_y: bool,
    /// Names for x = 0, 1, 2 ..., which have bars; numbers, which have lines, if there are none.
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
        Self { name: name.to_owned(), colour: GUIDE, dashed: true, points: ends.to_vec() }
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
        range(self.lines.iter().flat_map(|line| self.drawn(line)).map(|point| point.0))
    }

    fn y_range(&self) -> (f64, f64) {
        range(self.lines.iter().flat_map(|line| self.drawn(line)).map(|point| point.1))
    }

    /// The points of a line that have a place in the picture.
    fn drawn<'a>(&self, line: &'a Line) -> impl Iterator<Item = (f64, f64)> + use<'a> {
        let log_y = self.log_y;
        let has_place = move |(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (*y > 0.0 || !log_y);
        line.points.iter().copied().filter(has_place)
    }

    /// Where x has a mark and a label: each name, or whole numbers, not too many.
    fn x_marks(&self) -> Vec<f64> {
        if !self.x_names.is_empty() {
            return (0..self.x_names.len()).map(|x| x as f64).collect();
        }
        let (low, high) = self.x_range();
        let (first, last) = (low.ceil() as i64, high.floor() as i64);
        let step = [1, 2, 5].iter().flat_map(|unit| (0..18).map(move |power| unit * 10_i64.pow(power)));
        let step = step.filter(|step| (last - first) / step < MOST_MARKS).min().unwrap_or(1);
        (first.div_euclid(step)..=last / step).map(|n| n * step).filter(|x| *x >= first).map(|x| x as f64).collect()
    }

    fn x_label(&self, x: f64) -> String {
        match self.x_names.is_empty() {
            true => format!("{x:.0}"),
            false => self.x_names.get(x.round() as usize).cloned().unwrap_or_default(),
        }
    }
}

/// An axis with marks where they are wanted. (The library chooses its own, by sums of fractions that miss whole
/// numbers.)
struct XAxis {
    axis: RangedCoordf64,
    marks: Vec<f64>,
}

impl Ranged for XAxis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.axis.map(value, limit)
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.axis.range()
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
}

/// Colours that stay apart for most kinds of colour blindness (Okabe and Ito).
fn colour(name: &str) -> RGBColor {
    match name {
        "llfree" | "p50" => RGBColor(0, 114, 178),
        "llfree-shared" | "llfree-pooled" | "balloon-joined" => RGBColor(86, 180, 233),
        "buddy" | "balloon" | "p99.9" | "lgalloc" | "raw" => RGBColor(213, 94, 0),
        "buddy-spin" | "balloon-huge" | "p99" | "lgalloc-eager" => RGBColor(230, 159, 0),
        "per-core" | "virtio-mem" | "system" => RGBColor(0, 158, 115),
        "queue" | "balloon-huge-joined" | "mmap" => RGBColor(204, 121, 167),
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
    let x = match panel.x_names.len() {
        0 if x_high > x_low => x_low - (x_high - x_low) * 0.03..x_high + (x_high - x_low) * 0.03,
        0 => x_low - 0.5..x_high + 0.5,
        names => -0.5..names as f64 - 0.5,
    };
    let x = XAxis { axis: x.into(), marks: panel.x_marks() };
    let mut chart = ChartBuilder::on(area);
    chart
        .margin(10)
        .margin_right(20)
        .caption(&panel.title, ("sans-serif", 16))
        .x_label_area_size(40)
        .y_label_area_size(58);
    if panel.log_y {
        // A power of ten below all there is: the smallest must not lie on the axis.
        let low = 10_f64.powf((y_low / 1.2).log10().floor());
        draw_lines(chart.build_cartesian_2d(x, (low..y_high * 1.4).log_scale())?, panel, low)
    } else {
        draw_lines(chart.build_cartesian_2d(x, 0.0..y_high.max(1.0) * 1.05)?, panel, 0.0)
    }
}

/// Draws the lines, or the bars, which stand on `floor`.
fn draw_lines<Y>(
    mut chart: ChartContext<'_, SVGBackend<'_>, Cartesian2d<XAxis, Y>>,
    panel: &Panel,
    floor: f64,
) -> Result<(), Box<dyn Error>>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .x_desc(panel.x_label)
        .y_desc(panel.y_label)
        .x_label_formatter(&|x| panel.x_label(*x))
        .y_label_formatter(&|y| y_label(*y))
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .draw()?;
    let has_bars = |line: &Line| !panel.x_names.is_empty() && line.colour != GUIDE;
    let groups = panel.lines.iter().filter(|line| has_bars(line)).count();
    let width = BARS / groups.max(1) as f64;
    let mut group = 0_i32;
    for line in &panel.lines {
        let points = panel.drawn(line);
        if has_bars(line) {
            let left = f64::from(group) * width - BARS / 2.0;
            let bar = |(x, y)| {
                let corners = [(x + left + width * 0.05, floor), (x + left + width * 0.95, y)];
                // What would be a dashed line is a paler bar.
                Rectangle::new(corners, line.colour.mix(if line.dashed { 0.5 } else { 1.0 }).filled())
            };
            chart.draw_series(points.map(bar))?;
            group += 1;
            continue;
        }
        if line.dashed {
            let points: Vec<_> = points.collect();
            chart.draw_series(DashedLineSeries::new(points, 6, 4, line.colour.stroke_width(2)))?;
        } else {
            chart.draw_series(LineSeries::new(points, line.colour.stroke_width(3)))?;
        }
        // A line of many points needs no marks; one of a single point is nothing else.
        if line.points.len() <= 12 && line.colour != GUIDE {
            chart.draw_series(panel.drawn(line).map(|point| Circle::new(point, 3, line.colour.filled())))?;
        }
    }
    Ok(())
}

/// A value on the y axis: as many digits as small ones need, and no more.
fn y_label(y: f64) -> String {
    let text = if y < 10.0 { format!("{y:.3}") } else { format!("{y:.0}") };
    match text.split_once('.') {
        Some(_) => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        None => text,
    }
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

    fn bars(values: &[(&str, f64)]) -> Panel {
        let mut panel = Panel { title: "install".into(), log_y: true, ..Panel::default() };
        for (x, (name, value)) in values.iter().enumerate() {
            panel.x_names.push((*name).to_owned());
            panel.point("p50".into(), "p50", false, (x as f64, *value));
        }
        panel
    }

    /// The heights of the filled rectangles in p50's colour.
    fn heights(svg: &str) -> Vec<u32> {
        let bars = svg.split("<rect ").filter(|rect| rect.contains("#0072B2"));
        let height = |rect: &str| rect.split_once("height=\"")?.1.split_once('"')?.0.parse().ok();
        bars.filter_map(height).collect()
    }

    #[test]
    fn every_category_has_its_label_and_its_bar() {
        for count in 1..=8 {
            let names: Vec<String> = (0..count).map(|i| format!("way-{i}")).collect();
            let values: Vec<_> = names.iter().map(|name| (name.as_str(), 3.0)).collect();
            let svg = draw("t", &[bars(&values)], 1).expect("strings are writable");
            assert!(names.iter().all(|name| svg.contains(name.as_str())), "{count}: {svg}");
            assert_eq!(heights(&svg).len(), count, "{svg}");
            let lines = svg.lines().filter(|line| line.starts_with("<polyline") && line.contains("#0072B2"));
            assert_eq!(lines.count(), 1, "that of the legend; nothing leads from one to the next: {svg}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_drawn_and_what_is_small_does_not_lie_on_the_axis() {
        let svg = draw("t", &[bars(&[("a", 0.02), ("b", f64::NAN), ("c", 900.0)])], 1).expect("writable");
        let heights = heights(&svg);
        assert_eq!(heights.len(), 2, "{svg}");
        assert!(heights[0] > 5 && heights[1] > heights[0], "{heights:?}");
    }

    #[test]
    fn numbers_on_axes_are_whole_and_few() {
        let mut panel = Panel::default();
        for x in [1.0, 2.0, 16.0] {
            panel.point("llfree".into(), "llfree", false, (x, 1.0));
        }
        assert_eq!(panel.x_marks(), [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0]);
        assert_eq!([0.05, 0.1, 2.5, 10.0, 1000.0].map(y_label), ["0.05", "0.1", "2.5", "10", "1000"]);
    }
}
