//! Runs contestants in turn, and says how they did.

use std::fmt;
use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// One contestant: its name and what measures it once.
pub(super) type Contestant<'a> = (String, Box<dyn FnMut() -> Result<f64> + 'a>);

/// Measures each in turn, `rounds` times. Who begins changes from round to round: what one leaves behind (a warm cache, a worn
/// disk) meets them all.
pub(super) fn in_turn(rounds: usize, mut contestants: Vec<Contestant<'_>>) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> =
        contestants.iter().map(|(name, _)| Row { name: name.clone(), samples: Vec::new() }).collect();
    for round in 0..rounds {
        for turn in 0..contestants.len() {
            let index = (round + turn) % contestants.len();
            let (name, measure) = &mut contestants[index];
            rows[index].samples.push(measure().with_context(|| format!("measuring {name}"))?);
        }
    }
    Ok(rows)
}

/// What was measured of one contestant.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) samples: Vec<f64>,
}

impl Row {
    pub(super) fn median(&self) -> f64 {
        median(self.samples.clone())
    }

    /// How many times the other this is: the median over the rounds. What disturbs a round disturbs both in it.
    fn ratio_to(&self, other: &Self) -> f64 {
        median(self.samples.iter().zip(&other.samples).map(|(own, other)| own / other).collect())
    }

    fn range(&self) -> (f64, f64) {
        let least = self.samples.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (least, most)
    }
}

pub(super) fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    match samples.len() {
        0 => f64::NAN,
        even if even % 2 == 0 => f64::midpoint(samples[middle - 1], samples[middle]),
        _ => samples[middle],
    }
}

/// A number that SPECIFICATION.md promises.
#[derive(Debug, Clone)]
pub(super) enum Promise {
    /// The named row is at least so many times one of these, by the median of the rounds. A peer of which there are several kinds,
    /// as in `peer (this way)`, is the best of them.
    Times(&'static str, f64, &'static [&'static str]),
    /// The named row is at most so many times this one.
    TimesAtMost(&'static str, f64, &'static str),
    /// The named row's median is at most this.
    AtMost(&'static str, f64),
}

/// One table.
#[derive(Debug)]
pub(super) struct Report {
    /// Also the name of its JSON file.
    pub(super) name: String,
    /// What is measured.
    pub(super) what: String,
    pub(super) unit: &'static str,
    /// The first is what the others are compared with.
    pub(super) rows: Vec<Row>,
    pub(super) promises: Vec<Promise>,
}

impl Report {
    fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    fn ratio(&self, row: &Row) -> f64 {
        row.ratio_to(&self.rows[0])
    }

    /// How many times the best row of a peer this one is.
    fn beside(&self, name: &str, peer: &str) -> f64 {
        let kinds = format!("{peer} ");
        let of_peer = |row: &&Row| row.name == peer || (row.name.starts_with(&kinds) && row.name.ends_with(')'));
        let best = self.rows.iter().filter(of_peer).max_by(|one, other| one.median().total_cmp(&other.median()));
        self.row(name).zip(best).map_or(f64::NAN, |(row, best)| row.ratio_to(best))
    }

    /// A promise in words, what came of it, and whether it is kept.
    fn verdict(&self, promise: &Promise) -> (String, f64, bool) {
        match *promise {
            Promise::Times(name, least, peers) => {
                let ratios = peers.iter().map(|peer| self.beside(name, peer));
                let ratio = ratios.fold(f64::NAN, f64::max);
                (format!("{name}: at least {least} x {}", peers.join(" or ")), ratio, ratio >= least)
            }
            Promise::TimesAtMost(name, most, peer) => {
                let ratio = self.beside(name, peer);
                (format!("{name}: at most {most:.2} x {peer}"), ratio, ratio <= most)
            }
            Promise::AtMost(name, most) => {
                let median = self.row(name).map_or(f64::NAN, Row::median);
                (format!("{name}: at most {most} {}", self.unit), median, median <= most)
            }
        }
    }

    /// Whether every promise is.
    pub(super) fn is_kept(&self) -> bool {
        self.promises.iter().all(|promise| self.verdict(promise).2)
    }

    /// The same for machines, with what the host was like.
    pub(super) fn json(&self) -> String {
        let row = |row: &Row| {
            json!({
                "name": row.name, "median": row.median(), "samples": row.samples,
                "ratio": self.ratio(row),
            })
        };
        let promise = |promise| {
            let (promised, measured, kept) = self.verdict(promise);
            json!({ "promised": promised, "measured": measured, "kept": kept })
        };
        let document = json!({
            "bench": self.name, "what": self.what, "unit": self.unit,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "promises": self.promises.iter().map(promise).collect::<Vec<_>>(),
            "host": host(),
        });
        format!("{document:#}\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.rows.first().map_or(0, |row| row.samples.len());
        writeln!(f, "{}: {}; {}, median of {runs}", self.name, self.what, self.unit)?;
        let width = self.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
        for row in &self.rows {
            let (least, most) = row.range();
            let (median, least, most) = (figure(row.median()), figure(least), figure(most));
            writeln!(f, "  {:width$}  {median:>9}  ({least} to {most})  {:.2} x", row.name, self.ratio(row))?;
        }
        for promise in &self.promises {
            let (promised, measured, kept) = self.verdict(promise);
            writeln!(f, "  promised: {promised}; {} ({measured:.2})", if kept { "kept" } else { "MISSED" })?;
        }
        Ok(())
    }
}

/// Three digits or so: the others are noise.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

fn host() -> Value {
    let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    json!({
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "load": read("/proc/loadavg"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(promises: Vec<Promise>) -> Report {
        let row = |name: &str, samples: &[f64]| Row { name: name.into(), samples: samples.into() };
        let rows = vec![row("one", &[100.0, 300.0, 200.0]), row("other", &[90.0, 280.0, 170.0])];
        Report { name: "test".into(), what: "nothing".into(), unit: "pieces", rows, promises }
    }

    #[test]
    fn medians_and_ratios() {
        let report = report(vec![Promise::Times("other", 0.8, &["one"]), Promise::AtMost("one", 199.0)]);
        let medians: Vec<String> = report.rows.iter().map(|row| figure(row.median())).collect();
        assert_eq!(medians, ["200", "170"]);
        // 0.9, 0.93, 0.85
        assert!(report.verdict(&report.promises[0]).2 && (report.ratio(&report.rows[1]) - 0.9).abs() < 1e-9);
        assert!(!report.verdict(&report.promises[1]).2 && !report.is_kept());
    }

    #[test]
    fn what_was_not_measured_keeps_no_promise() {
        assert!(!report(vec![Promise::Times("third", 0.1, &["one"])]).is_kept());
        assert!(!report(vec![Promise::Times("one", 0.1, &["third"])]).is_kept());
        assert!(!report(vec![Promise::AtMost("third", 1e9)]).is_kept());
    }

    #[test]
    fn the_best_kind_of_a_peer_counts_and_the_slowest_peer_is_enough() {
        let mut report = report(vec![]);
        for (name, sample) in [("peer (slow)", 50.0), ("peer (fast)", 400.0), ("other peer", 100.0)] {
            report.rows.push(Row { name: name.into(), samples: vec![sample; 3] });
        }
        assert!((report.beside("one", "peer") - 0.5).abs() < 1e-9);
        let slowest = Promise::Times("one", 1.9, &["peer", "other peer"]);
        assert!(report.verdict(&slowest).2);
    }

    #[test]
    fn everybody_is_measured_in_every_round_and_begins_in_turn() {
        let order = std::cell::RefCell::new(Vec::new());
        let contestant = |name: &str| -> Contestant<'_> {
            let own = name.to_owned();
            let order = &order;
            (
                name.to_owned(),
                Box::new(move || {
                    order.borrow_mut().push(own.clone());
                    Ok(1.0)
                }),
            )
        };
        let rows = in_turn(2, vec![contestant("a"), contestant("b")]).expect("both can be measured");
        assert!(rows.iter().all(|row| row.samples.len() == 2));
        assert_eq!(order.into_inner(), ["a", "b", "b", "a"]);
    }
}
