//! Stories on a real guest, told with the real commands: each is printed as it would be typed, and carried out by the same code.

mod files;
mod guest;
mod week;

use crate::cli::{self, Cli};
use crate::draw::{COLUMNS, Look};
use crate::out::Out;
use crate::session::Session;
use clap::Parser;
use files::Nicknames;
use guest::Guest;
use machine::request::Problem;
use machine::root::Found;
use std::path::{Path, PathBuf};

pub(crate) use week::{YOUR_OWN, tell as week};

/// The machine's name in every story.
const NAME: &str = "Tenby";

/// Where a story is played: a root of its own, never the user's.
struct Stage {
    session: Session,
    guest: Boot,
    names: Nicknames,
}

/// The test guest's files.
struct Boot {
    kernel: PathBuf,
    initrd: PathBuf,
    append: String,
}

impl Stage {
    /// Clears the stage: a machine of an earlier run goes. Anybody else's machine stays, and the story is refused.
    async fn set(said: Option<&Path>) -> Result<Self, Problem> {
        let usual = || std::env::temp_dir().join(format!("tenby-demo-{}", rustix::process::getuid().as_raw()));
        let root = said.map_or_else(usual, Path::to_owned);
        let stage = Self {
            session: Session::open(Some(&root), Out::new(false, false))?,
            guest: Boot::find()?,
            names: Nicknames::default(),
        };
        for found in stage.session.root.list()? {
            if found.name != NAME {
                let message = format!("{} holds the machine {}, which is not the demo's", root.display(), found.name);
                return Err(Problem::refused(message).hint("tenby --root DIR demo week"));
            }
            let words = ["tenby", "--quiet", "vm", "delete", NAME, "--yes"];
            Box::pin(cli::run(stage.parse(&words)?)).await?;
        }
        Ok(stage)
    }

    fn parse(&self, words: &[&str]) -> Result<Cli, Problem> {
        let mut cli = Cli::try_parse_from(words).map_err(|error| Problem::failed(format!("{words:?}: {error}")))?;
        cli.global.root = Some(self.session.root.path().to_owned());
        Ok(cli)
    }

    /// Prints a command as one would type it, and carries it out.
    async fn tenby(&self, words: &[&str]) -> Result<(), Problem> {
        self.say(&format!("\n{}", typed(words)));
        self.quietly(words).await
    }

    /// Carries a command out without printing it.
    async fn quietly(&self, words: &[&str]) -> Result<(), Problem> {
        let all: Vec<&str> = std::iter::once("tenby").chain(words.iter().copied()).collect();
        Box::pin(cli::run(self.parse(&all)?)).await
    }

    fn say(&self, line: &str) {
        self.session.out.text(&format!("{line}\n"));
    }

    /// A day begins.
    fn day(&self, name: &str) {
        let line = if self.look().utf8 { "─" } else { "-" };
        let style = anstyle::Style::new().bold();
        self.say(&format!("\n{} {}", self.look().paint(name, style), line.repeat(78 - name.len())));
    }

    fn look(&self) -> &Look {
        self.session.out.look()
    }

    fn found(&self) -> Result<Found, Problem> {
        self.session.find(NAME)
    }

    /// The guest, to talk to.
    async fn talk(&self) -> Result<Guest, Problem> {
        Guest::meet(&self.session, &self.found()?).await
    }

    /// The tree, and the files that it is made of.
    async fn show(&mut self) -> Result<(), Problem> {
        self.tenby(&["snapshot", "list", NAME]).await?;
        let reader = self.session.reader(&self.found()?).await?;
        let folder = self.session.root.machine_folder(self.found()?.id);
        let table = self.names.table(&reader.ledger().await?, &folder)?;
        self.say(&format!("\n{}", table.trim_end()));
        Ok(())
    }
}

impl Boot {
    /// The guest that the project builds: where `$TENBY_GUEST` says, else in `target/guest`.
    fn find() -> Result<Self, Problem> {
        let folder = std::env::var_os("TENBY_GUEST").map_or_else(|| PathBuf::from("target/guest"), PathBuf::from);
        let missing = |file: &Path| {
            Problem::not_found(format!("the demo's guest is not there: {}", file.display()))
                .hint("cargo xtask demo      (in tenby's repository: it builds the guest)")
        };
        let append = std::fs::read_to_string(folder.join("append")).map_err(|_| missing(&folder.join("append")))?;
        let boot =
            Self { kernel: folder.join("kernel"), initrd: folder.join("initrd"), append: append.trim().to_owned() };
        for file in [&boot.kernel, &boot.initrd] {
            if !file.exists() {
                return Err(missing(file));
            }
        }
        Ok(boot)
    }
}

/// A command as one would type it, with its lines broken before the page's edge.
fn typed(words: &[&str]) -> String {
    let mut lines = vec!["$ tenby".to_owned()];
    for word in words {
        let word = shown(word);
        let line = lines.last_mut().expect("there is a first line");
        if line.len() + 1 + word.len() > COLUMNS - 2 {
            line.push_str(" \\");
            lines.push(format!("      {word}"));
        } else {
            line.push(' ');
            line.push_str(&word);
        }
    }
    lines.join("\n")
}

/// A word as one would type it, on a page of 80 columns: long paths are told by their end.
fn shown(word: &str) -> String {
    if word.len() > 40 && word.contains(' ') {
        return "'…'".to_owned();
    }
    match word.rsplit_once('/') {
        Some((_, name)) if word.len() > 24 => format!("…/{name}"),
        _ => cli::quoted_loosely(word),
    }
}
