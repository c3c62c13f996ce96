//! What people read, as pure functions: sizes, dates, tables, the tree, jobs. Everything fits into 80 columns, reads without colour,
//! and has an ASCII drawing for locales without UTF-8.

mod job;
mod problem;
mod table;
mod tree;
mod vm;

pub(crate) use job::{describe as job_line, done, jobs};
pub(crate) use problem::{named_by, problem};
pub(crate) use table::{Align, Table};
pub(crate) use tree::{pending, snapshot, tree, undo};
pub(crate) use vm::{audit, home, machine, machines, plan};

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// The columns that everything fits into.
pub(crate) const COLUMNS: usize = 80;

/// How things look here and now; tests choose their own.
#[derive(Debug, Clone)]
pub(crate) struct Look {
    /// Whether the drawing may use UTF-8.
    pub(crate) utf8: bool,
    /// Whether words of state are coloured.
    pub(crate) colour: bool,
    /// The zone that dates are told in.
    pub(crate) zone: TimeZone,
    /// What time it is: dates of long ago are told with their year.
    pub(crate) now: Timestamp,
}

impl Look {
    /// As the environment says.
    pub(crate) fn here() -> Self {
        Self {
            utf8: utf8(|name| std::env::var(name).ok()),
            colour: true,
            zone: TimeZone::system(),
            now: Timestamp::now(),
        }
    }

    /// "23 Nov 23:40", or "23 Nov  2019" if that is long ago. Always 12 columns.
    pub(crate) fn date(&self, at: Timestamp) -> String {
        let months = (self.now.as_second() - at.as_second()).abs() / (30 * 86400);
        let format = if months < 10 { "%e %b %H:%M" } else { "%e %b  %Y" };
        at.to_zoned(self.zone.clone()).strftime(format).to_string()
    }

    /// A name cut to `width` columns.
    pub(crate) fn cut(&self, text: &str, width: usize) -> String {
        if text.chars().count() <= width {
            return text.to_owned();
        }
        let dots = if self.utf8 { "…" } else { "..." };
        let kept = width.saturating_sub(dots.chars().count());
        text.chars().take(kept).chain(dots.chars()).collect()
    }

    /// A word in a style, if colours are wanted. (They are stripped later where the output is no terminal.)
    pub(crate) fn paint(&self, word: &str, style: anstyle::Style) -> String {
        if self.colour { format!("{style}{word}{style:#}") } else { word.to_owned() }
    }
}

/// Whether the locale has UTF-8, by the first of the variables that is set.
fn utf8(variable: impl Fn(&str) -> Option<String>) -> bool {
    let locale =
        ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(|name| variable(name).filter(|value| !value.is_empty()));
    locale.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

/// Bytes in binary units, at most four columns: `0`, `12M`, `1.2G`.
pub(crate) fn size(bytes: u64) -> String {
    if bytes < 1000 {
        return if bytes == 0 { "0".to_owned() } else { format!("{bytes}B") };
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in ["K", "M", "G", "T", "P", "E"] {
        if value < 999.5 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    let number = if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{}{unit}", number.strip_suffix(".0").unwrap_or(&number))
}

/// "1 file", "2 files".
pub(crate) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// A text of the user's on one line, without what would steer a terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// An id, as short as people type it.
pub(crate) fn short(id: impl std::fmt::Display) -> String {
    id.to_string().chars().take(8).collect()
}

/// A state, and what is under way beside it: "running, merging".
fn with_doing(now: machine::tree::State, doing: &[String], look: &Look) -> String {
    let words: Vec<String> = std::iter::once(state(look, now)).chain(doing.iter().map(|word| plain(word))).collect();
    words.join(", ")
}

/// A state's word and its colour.
fn state(look: &Look, state: machine::tree::State) -> String {
    use anstyle::AnsiColor::{Cyan, Green, Yellow};
    use machine::tree::State::{Off, Paused, Running, Saved, Saving, Starting, Stopping};
    let word = state_word(state);
    let colour = match state {
        Running => Green,
        Saved => Cyan,
        Starting | Paused | Saving | Stopping => Yellow,
        Off => return word.to_owned(),
    };
    look.paint(word, colour.on_default())
}

/// A state's word, exactly the contract's.
pub(crate) fn state_word(state: machine::tree::State) -> &'static str {
    use machine::tree::State::{Off, Paused, Running, Saved, Saving, Starting, Stopping};
    match state {
        Off => "off",
        Starting => "starting",
        Running => "running",
        Paused => "paused",
        Saving => "saving",
        Saved => "saved",
        Stopping => "stopping",
    }
}

/// Milliseconds as people say them: "3 ms", "1.2 s", "2 min 5 s".
pub(crate) fn duration(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..10_000 => format!("{:.1} s", ms as f64 / 1000.0),
        10_000..60_000 => format!("{} s", ms / 1000),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The look of the contract's examples: 80 columns, no colour, UTC, in the week of the story.
    pub(crate) fn look() -> Look {
        Look { utf8: true, colour: false, zone: TimeZone::UTC, now: "2026-11-27T08:00:00Z".parse().unwrap() }
    }

    #[test]
    fn sizes_take_four_columns() {
        let mega = 1 << 20;
        for (bytes, text) in [
            (0, "0"),
            (1, "1B"),
            (999, "999B"),
            (1000, "1K"),
            (4096, "4K"),
            (12 * mega, "12M"),
            (140 * mega, "140M"),
            (1023 * mega, "1G"),
            (1 << 30, "1G"),
            (1_288_490_188, "1.2G"),
            (20 << 30, "20G"),
            (9_999 * mega, "9.8G"),
            (10_200 * mega, "10G"),
            (u64::MAX, "16E"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn the_locale_is_the_first_variable_that_is_set() {
        let of = |pairs: &'static [(&str, &str)]| {
            utf8(move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
        };
        assert!(of(&[("LANG", "C.UTF-8")]));
        assert!(of(&[("LC_ALL", ""), ("LANG", "de_DE.utf8")]));
        assert!(!of(&[("LC_ALL", "C"), ("LANG", "C.UTF-8")]));
        assert!(!of(&[]));
    }

    #[test]
    fn old_dates_have_their_year_and_the_same_width() {
        let look = look();
        assert_eq!(look.date("2026-11-23T23:40:00Z".parse().unwrap()), "23 Nov 23:40");
        assert_eq!(look.date("2019-01-03T23:40:00Z".parse().unwrap()), " 3 Jan  2019");
    }

    #[test]
    fn durations_are_told_as_people_tell_them() {
        for (ms, text) in
            [(3, "3 ms"), (1234, "1.2 s"), (59_999, "59 s"), (125_000, "2 min 5 s"), (7_260_000, "2 h 1 min")]
        {
            assert_eq!(duration(ms), text);
        }
    }
}
