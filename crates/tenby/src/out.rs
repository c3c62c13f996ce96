//! What goes where: results to standard output, everything else to standard error; with `--json` one document and nothing else there.

use crate::draw::{self, Look};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use machine::plan::quoted;
use machine::request::{Job, Problem};
use serde::Serialize;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

/// Where a command's words go.
#[derive(Debug, Clone)]
pub(crate) struct Out {
    json: bool,
    quiet: bool,
    /// The root that was said with the command, and has to be said again with the next.
    root: Option<PathBuf>,
    look: Look,
}

impl Out {
    /// As the global options say.
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet, root: None, look: Look::here() }
    }

    /// Of a command that was told where the machines are, with `--root`.
    pub(crate) fn at_root(self, root: Option<PathBuf>) -> Self {
        Self { root, ..self }
    }

    /// The same, but nothing is said beside results.
    pub(crate) fn quietly(&self) -> Self {
        Self { quiet: true, ..self.clone() }
    }

    /// How things look.
    pub(crate) fn look(&self) -> &Look {
        &self.look
    }

    /// Whether a document is wanted.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// What was asked for: a table, a tree.
    #[expect(clippy::unused_self, reason = "where a command's words go is the output's business")]
    pub(crate) fn text(&self, text: &str) {
        put(&mut anstream::stdout().lock(), text.as_bytes());
    }

    /// That something was done: a line, unless quiet.
    pub(crate) fn done(&self, line: &str) {
        if !self.quiet && !self.json {
            self.text(&format!("{}\n", draw::plain(line)));
        }
    }

    /// A line for people beside the result, on standard error.
    pub(crate) fn note(&self, line: &str) {
        if !self.quiet {
            put(&mut anstream::stderr().lock(), format!("{}\n", draw::plain(line)).as_bytes());
        }
    }

    /// The document.
    #[expect(clippy::unused_self, reason = "where a command's words go is the output's business")]
    pub(crate) fn document(&self, document: &impl Serialize) {
        let text = serde_json::to_string_pretty(document).expect("documents hold nothing that JSON cannot");
        put(&mut io::stdout().lock(), format!("{text}\n").as_bytes());
    }

    /// The document with `--json`, else the text.
    pub(crate) fn show(&self, document: &impl Serialize, text: impl FnOnce(&Look) -> String) {
        if self.json { self.document(document) } else { self.text(&text(&self.look)) }
    }

    /// A failure or a refusal.
    pub(crate) fn problem(&self, problem: &Problem) {
        if self.json {
            self.document(&crate::json::Failure::new(&self.ready_to_paste(problem)));
        }
        self.failure(problem);
    }

    /// The words of a failure alone, where the document is already out.
    pub(crate) fn failure(&self, problem: &Problem) {
        put(&mut anstream::stderr().lock(), draw::problem(&self.ready_to_paste(problem), &self.look).as_bytes());
    }

    /// With a hint that finds the machines where this command found them.
    fn ready_to_paste(&self, problem: &Problem) -> Problem {
        let mut problem = problem.clone();
        if let (Some(root), Some(hint)) = (&self.root, &mut problem.hint) {
            *hint = at_root(hint, &quoted(&root.to_string_lossy()));
        }
        problem
    }

    /// A bar for a long operation: only on a terminal, only when it lasts.
    pub(crate) fn progress(&self) -> Progress {
        let visible = !self.quiet && io::stderr().is_terminal();
        Progress::new(visible, self.look.utf8)
    }
}

/// A hint with the root in its commands: all but those that say it, and those that know of files only.
fn at_root(hint: &str, root: &str) -> String {
    if hint.contains("--root") {
        return hint.to_owned();
    }
    let command = |words: &str| match words.strip_prefix("tenby ") {
        Some(rest) if !rest.starts_with("disk ") => format!("tenby --root {root} {rest}"),
        _ => words.to_owned(),
    };
    hint.split("(or: ").map(command).collect::<Vec<_>>().join("(or: ")
}

/// Whether a question can be asked: a person sits at both ends.
pub(crate) fn interactive() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks on the terminal; the answer without spaces around it, `None` at the end of input.
pub(crate) fn ask(question: &str) -> Option<String> {
    put(&mut anstream::stderr().lock(), question.as_bytes());
    let mut answer = String::new();
    match io::stdin().read_line(&mut answer) {
        Ok(1..) => Some(answer.trim().to_owned()),
        _ => None,
    }
}

/// Writes all of it. A reader that has gone away (`| head`) wants no more: the command ends quietly.
pub(crate) fn put(to: &mut impl Write, bytes: &[u8]) {
    if to.write_all(bytes).and_then(|()| to.flush()).is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
        std::process::exit(0);
    }
}

/// A progress bar, or nothing where nobody would see it.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(visible: bool, utf8: bool) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(100), target);
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos:>3}%").expect("the template is well formed");
        bar.set_style(style.progress_chars(if utf8 { "━━─" } else { "=> " }));
        Self { bar }
    }

    /// How a job goes.
    pub(crate) fn job(&self, job: &Job) {
        self.bar.set_position(u64::from(job.percent.min(100)));
        self.bar.set_message(draw::job_line(job, jiff::Timestamp::now()));
    }

    /// How much of something is done.
    pub(crate) fn bytes(&self, what: &str, done: u64, total: u64) {
        self.bar.set_position((u128::from(done) * 100 / u128::from(total.max(1))) as u64);
        self.bar.set_message(format!("{what}: {} of {}", draw::size(done), draw::size(total)));
    }

    /// Something that has no measure.
    pub(crate) fn say(&self, what: &str) {
        self.bar.set_message(draw::plain(what));
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::at_root;

    #[test]
    fn a_hint_says_the_root_that_was_said() {
        let said = [
            ("tenby vm start web", "tenby --root '/my lab' vm start web"),
            (
                "tenby vm detach NAME      (gives it a copy)",
                "tenby --root '/my lab' vm detach NAME      (gives it a copy)",
            ),
            (
                "tenby snapshot list web      (or: tenby vm list)",
                "tenby --root '/my lab' snapshot list web      (or: tenby --root '/my lab' vm list)",
            ),
            (
                "tenby snapshot apply web Tuesday --keep      (or: --discard)",
                "tenby --root '/my lab' snapshot apply web Tuesday --keep      (or: --discard)",
            ),
            ("tenby disk check a.vhdx", "tenby disk check a.vhdx"),
            ("tenby --root DIR demo week", "tenby --root DIR demo week"),
            ("tenby '--root=/my lab' vm show 3f9c", "tenby '--root=/my lab' vm show 3f9c"),
        ];
        for (hint, ready) in said {
            assert_eq!(at_root(hint, "'/my lab'"), ready);
        }
    }
}
