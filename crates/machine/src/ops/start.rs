//! Starting, pausing, resuming, restarting; and what the guest does by itself.

use crate::actor::Owner;
use crate::files::file_problem;
use crate::job::Task;
use crate::lent::{self, Lent};
use crate::live::{Happening, Live, Memory, pin, qemu_problem};
use crate::log;
use crate::needs::Here;
use crate::plan::quoted;
use crate::ram::{Pieces, of_memory};
use crate::records::downwards;
use crate::request::Problem;
use crate::root::Root;
use crate::tree::{Config, LayerId, Machine, State};
use memory::Stretch;
use qemu::{Installed, RunState};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use store::host::HostFolder;
use store::{ErrorKind, Folder, Store};

/// The screen's picture, in the folder of QEMU's sockets.
const PICTURE: &str = "screen.png";

/// No screen makes a larger one, bytes.
const LARGEST_PICTURE: u64 = 256 << 20;

impl Owner {
    /// Boots the guest, or resumes its saved memory. The ledger says `running` before the guest's first instruction (invariant 6).
    pub(crate) async fn start(&mut self, task: &Task, paused: bool) -> Result<Value, Problem> {
        let state = if paused { State::Paused } else { State::Running };
        let result = json!({ "state": state });
        self.start_for(task, state, &result).await?;
        Ok(result)
    }

    /// The same for a request of which it is the end, and that comes to `result`.
    pub(crate) async fn start_for(&mut self, task: &Task, state: State, result: &Value) -> Result<(), Problem> {
        self.passing(State::Starting);
        let mut next = self.machine().machine.clone();
        let memory = self.saved_memory(&next).await?;
        let loaded = memory.as_ref().map(|memory| memory.layer);
        let live = self.bring_up(task, &mut next, memory).await?;
        self.keeper.steps.at("start:up");
        if let Err(problem) = task.check() {
            self.end(live).await;
            return Err(problem);
        }
        next.start(state, loaded, live.run());
        next.now.restoring = live.lent().map(Lent::layer);
        if let Err(problem) = self.keeper.settle(task, result, |machine| *machine = next) {
            self.end(live).await;
            return Err(problem);
        }
        self.keeper.steps.at("start:committed");
        self.go_live(live);
        if state == State::Running {
            self.let_run().await?;
        }
        log::write(
            &self.keeper.files,
            Some(task.id()),
            if loaded.is_some() { "resumed from its saved memory" } else { "started" },
        );
        Ok(())
    }

    /// The memory that a machine was saved with, if it was.
    async fn saved_memory(&self, machine: &Machine) -> Result<Option<Memory>, Problem> {
        let (name, Some(layer)) = (&machine.name, machine.now.memory) else { return Ok(None) };
        let what = format!("the memory that {name} was saved with");
        let stop = format!("tenby vm stop {} --turn-off", quoted(name));
        let without = format!("{stop}      (gives that memory up; then it can be started from its disks)");
        self.open_memory(machine, &machine.now.config, layer, &what, without).await.map(Some)
    }

    /// Brings up a QEMU for `next` (Now as it is to be), standing still; `memory` is loaded into it. What is chosen at the first start is noted
    /// in `next`.
    pub(crate) async fn bring_up(
        &self,
        task: &Task,
        next: &mut Machine,
        memory: Option<Memory>,
    ) -> Result<Live, Problem> {
        let installed = installed(&next.name).await?;
        let config = &mut next.now.config;
        let kind = &mut config.machine_type;
        let before = kind.take_if(|kind| memory.is_none() && installed.check_machine_type(kind).is_err());
        pin(config, &installed)?;
        if let (Some(before), Some(kind)) = (before, &config.machine_type) {
            let version = &installed.version;
            self.warn(
                task,
                &format!(
                    "{} is a {kind} from now on, to its guest another main board: QEMU {version} has no {before}",
                    next.name
                ),
            );
        }
        Live::bring_up(&self.keeper, next, &installed, memory).await
    }

    /// A memory to go on from, for a guest of this configuration. Refused where what it needs is not here: `what` is what it is called, `without`
    /// what a person types to do without it.
    pub(crate) async fn open_memory(
        &self,
        machine: &Machine,
        config: &Config,
        layer: LayerId,
        what: &str,
        without: String,
    ) -> Result<Memory, Problem> {
        let installed = installed(&machine.name).await?;
        let taken_on = machine.layers.get(&layer).and_then(|row| row.taken_on.clone());
        if let Some(lacks) = Here::look(&installed).lacks(config, taken_on.as_ref()) {
            return Err(Problem::refused(format!("{what} {lacks}")).hint(without));
        }
        let layers = self.keeper.files.open_chain(machine, layer)?;
        let (files, chain) = (self.keeper.files.clone(), downwards(machine, layer));
        let expected = tokio::task::spawn_blocking(move || files.expected(&chain));
        Ok(Memory { layer, layers, expected, touched: self.habits.of(layer), taken_on, without })
    }

    /// Says what the user should know before it goes on, and notes it.
    pub(crate) fn warn(&self, task: &Task, words: &str) {
        task.warn(words);
        log::write(&self.keeper.files, Some(task.id()), words);
    }

    /// This QEMU is the machine's from now on.
    pub(crate) fn go_live(&mut self, mut live: Live) {
        let sockets = live.sockets(&self.machine().machine);
        let pid = live.qemu.identity().pid;
        self.shared.set_moment(|moment| {
            moment.sockets = Some(sockets);
            moment.qemu = Some(pid);
            moment.alert = None;
        });
        if let Err(error) = live.qemu.attach_console(&self.console) {
            tracing::warn!("the console cannot be typed on: {error}");
        }
        live.lent().inspect(|lent| lent.come());
        live.tell_the_time(&self.keeper);
        self.live = Some(live);
    }

    /// Opens the published ports and lets the guest run.
    pub(crate) async fn let_run(&self) -> Result<(), Problem> {
        let Some(live) = &self.live else { return Ok(()) };
        let rows = self.machine();
        let name = &rows.machine.name;
        let published = live.publish(&rows.machine.now.config).await;
        live.qemu.resume().await.map_err(|e| qemu_problem(name, &e))?;
        published.map_err(|problem| {
            Problem::failed(format!("{name} runs, but a port could not be published: {}", problem.message))
                .hint(format!("tenby vm show {}", quoted(name)))
        })
    }

    /// Halts the processors.
    pub(crate) async fn pause(&mut self, task: &Task) -> Result<Value, Problem> {
        let (live, name) = self.running()?;
        live.qemu.pause().await.map_err(|e| qemu_problem(&name, &e))?;
        self.keeper.steps.at("pause:paused");
        let result = json!({ "state": State::Paused });
        let paused = self.keeper.settle(task, &result, |machine| machine.now.state = State::Paused);
        if paused.is_err() {
            live.qemu.resume().await.map_err(|e| qemu_problem(&name, &e))?;
        }
        paused.map(|()| result)
    }

    /// Lets the processors go on.
    pub(crate) async fn resume(&mut self, task: &Task) -> Result<Value, Problem> {
        let result = json!({ "state": State::Running });
        self.keeper.settle(task, &result, |machine| {
            machine.now.state = State::Running;
            machine.now.touched = true;
        })?;
        self.keeper.steps.at("resume:committed");
        self.let_run().await?;
        self.shared.set_moment(|moment| moment.alert = None);
        Ok(result)
    }

    /// Resets the guest. One that goes on as another machine comes up as itself: that takes a new QEMU.
    pub(crate) async fn restart(&mut self, task: &Task) -> Result<Value, Problem> {
        if self.machine().machine.now.config.borrowed.is_some() {
            self.off("restarted, to come up as itself", None).await;
            return self.start(task, false).await;
        }
        let (live, name) = self.running()?;
        live.qemu.reset().await.map_err(|e| qemu_problem(&name, &e))?;
        // It reads the time as it comes up.
        let told = self.keeper.book.commit(|rows| rows.machine.now.run.iter_mut().for_each(|run| run.clock = None));
        if let Err(problem) = told {
            tracing::error!("{problem}");
        }
        log::write(&self.keeper.files, Some(task.id()), "restarted");
        Ok(Value::Null)
    }

    pub(crate) fn running(&self) -> Result<(&Live, String), Problem> {
        let name = self.shared.name();
        match &self.live {
            Some(live) => Ok((live, name)),
            None => Err(Problem::failed(format!("{name} has no QEMU"))),
        }
    }

    /// A picture of the screen, PNG.
    pub(crate) async fn screenshot(&self) -> Result<Vec<u8>, Problem> {
        let rows = self.machine();
        let name = &rows.machine.name;
        let Some(live) = &self.live else {
            return Err(Problem::refused(format!(
                "{name} has no screen while it is {}",
                crate::admit::word(rows.machine.now.state)
            ))
            .hint(format!("tenby vm start {}", quoted(name))));
        };
        let picture = new_picture(live.run_dir()).map_err(|e| file_problem(&e))?;
        qemu::hand_over(live.run_dir(), PICTURE).map_err(|e| qemu_problem(name, &e))?;
        live.qemu.screendump(Path::new(PICTURE)).await.map_err(|e| qemu_problem(name, &e))?;
        let len = picture.len().map_err(|e| file_problem(&e))?;
        if len > LARGEST_PICTURE {
            return Err(Problem::failed(format!("QEMU made a picture of {len} bytes of the screen of {name}")));
        }
        let mut png = vec![0; len as usize];
        picture.read_at(&mut png, 0).map_err(|e| file_problem(&e))?;
        Ok(png)
    }

    /// Something has happened that nobody asked for.
    pub(crate) async fn happened(&mut self, happening: Happening) {
        match happening {
            Happening::Guest(event) => self.react(event).await,
            Happening::Memory(happening) => self.remember(happening).await,
        }
    }

    /// The guest has come to something by itself: it powered off, its QEMU ended, a disk failed.
    pub(crate) async fn react(&mut self, event: RunState) {
        match event {
            RunState::Shutdown => self.off("the guest powered off", None).await,
            RunState::Exited(how) => {
                let lost = self.memory_lost();
                let alert = format!("QEMU {how}{lost}; the disks are as after a power cut");
                self.off(&alert, Some(alert.clone())).await;
            }
            RunState::IoError => {
                let why = self.note_failed_disk();
                self.halted(why);
            }
            RunState::Panicked => self.halted("the guest reported its own death and stands still"),
            RunState::Broken => self.halted("QEMU cannot let the guest run any further"),
            RunState::Running | RunState::Paused | RunState::Incoming => {}
        }
    }

    /// What is to be said besides of a guest that has gone before all of its memory had come. What it came from is only read.
    pub(crate) fn memory_lost(&self) -> &'static str {
        let coming = self.machine().machine.now.restoring.is_some();
        if coming { " while its memory was on its way into it, and all snapshots are as they were" } else { "" }
    }

    /// Something is to be told of the memory that is on its way into the guest.
    pub(crate) async fn remember(&mut self, happening: lent::Happening) {
        match happening {
            lent::Happening::Trouble(problem) => {
                let layer = self.live.as_ref().and_then(|live| live.lent().map(Lent::layer));
                let alert = waits(&match layer {
                    Some(layer) => of_memory(problem, &self.machine().machine, layer),
                    None => problem,
                });
                if self.shared.moment().alert.as_ref() != Some(&alert) {
                    log::write(&self.keeper.files, None, &alert);
                    self.shared.set_moment(|moment| moment.alert = Some(alert));
                }
            }
            lent::Happening::Ended(ended) => {
                let layer = self.live.as_ref().and_then(|live| live.lent().map(Lent::layer));
                let ended = match ended {
                    Ok(memory::Lent { used, touched }) => {
                        if let Some(layer) = layer {
                            self.habits.note(layer, touched);
                        }
                        self.filled(used).await
                    }
                    Err(problem) => self.lend_again(problem).await,
                };
                if let Err(problem) = ended {
                    tracing::error!("{problem}");
                }
            }
        }
    }

    /// All of the guest's memory has been sent: what it came from is not needed any more.
    async fn filled(&mut self, used: Vec<Stretch>) -> Result<(), Problem> {
        let name = self.shared.name();
        let Some(live) = &mut self.live else { return Ok(()) };
        live.filled().await.map_err(|e| qemu_problem(&name, &e))?;
        self.keeper.book.commit(|rows| rows.machine.now.restoring = None)?;
        self.keeper.steps.at("restore:filled");
        if let Some(live) = &mut self.live {
            live.collapse(Pieces { used, ..Pieces::default() }).await;
        }
        Ok(())
    }

    /// No more of the guest's memory comes. If QEMU still needs it: once more, over a new connection. What breaks off a second time would do so
    /// for ever; the next worker tries again.
    async fn lend_again(&mut self, problem: Problem) -> Result<(), Problem> {
        let rows = self.machine();
        let Some(live) = self.live.as_mut().filter(|live| qemu::alive(live.qemu.identity())) else { return Ok(()) };
        let again = live.lent().is_some_and(Lent::is_again);
        live.forget_lent();
        if again {
            let alert = format!("the rest of the guest's memory does not come, and it waits for it: {problem}");
            log::write(&self.keeper.files, None, &alert);
            self.shared.set_moment(|moment| moment.alert = Some(alert));
            return Ok(());
        }
        live.take_up_again(&self.keeper, &rows.machine).await?;
        if live.lent().is_none() {
            // The last that we sent had arrived.
            return self.filled(Vec::new()).await;
        }
        log::write(&self.keeper.files, None, &format!("{problem}; it is tried once more"));
        Ok(())
    }

    /// Waits until all of the guest's memory has arrived: before that it cannot be captured.
    pub(crate) async fn fill(&mut self, task: &Task) -> Result<(), Problem> {
        let words = "waiting for the rest of its memory";
        while let Some(live) = self.live.as_mut().filter(|live| live.lent().is_some()) {
            live.lent().inspect(|lent| lent.hurry());
            self.shared.set_moment(|moment| moment.doing = vec![words.to_owned()]);
            let happening = tokio::select! {
                happening = live.next_of_memory() => happening,
                () = task.cancel().wait() => return task.check(),
            };
            self.remember(happening).await;
        }
        Ok(())
    }

    fn halted(&self, why: &str) {
        log::write(&self.keeper.files, None, why);
        self.shared.set_moment(|moment| moment.alert = Some(why.to_owned()));
        let halted = self.keeper.book.commit(|rows| rows.machine.now.state = State::Paused);
        if let Err(problem) = halted {
            tracing::error!("{problem}");
        }
    }

    /// Ends a QEMU. If its disks did not take its last writes, a person should know.
    pub(crate) async fn end(&self, live: Live) {
        if let Err(problem) = live.end().await {
            let alert = format!("the last writes to a disk are lost, or will be when the host stops: {problem}");
            log::write(&self.keeper.files, None, &alert);
            self.shared.set_moment(|moment| moment.alert = Some(alert));
        }
    }

    /// The machine is off: QEMU goes, if it is still there.
    pub(crate) async fn off(&mut self, why: &str, alert: Option<String>) {
        self.stop_folding().await;
        // Nobody stands still for want of room any more.
        self.out_of_room = None;
        self.shared.set_moment(|moment| {
            moment.sockets = None;
            moment.qemu = None;
            moment.alert = alert;
        });
        if let Some(live) = self.live.take() {
            self.end(live).await;
        }
        log::write(&self.keeper.files, None, why);
        self.say_off();
    }

    /// Whether QEMU is gone and the ledger could not say so yet, as on a full disk.
    pub(crate) fn is_off_unsaid(&self) -> bool {
        self.live.is_none() && matches!(self.machine().machine.now.state, State::Running | State::Paused)
    }

    /// The ledger says that the machine is off, if it does not yet. If it cannot be written, that is tried again; what is shown is true at once,
    /// and another worker would find QEMU gone.
    pub(crate) fn say_off(&mut self) {
        if !self.is_off_unsaid() {
            return;
        }
        let said = self.keeper.book.commit(|rows| rows.machine.turn_off());
        let shown = said.is_err().then_some(State::Off);
        self.shared.set_moment(|moment| moment.state = shown);
        if let Err(problem) = said {
            tracing::error!("{problem}; it is tried again");
        }
    }
}

/// An empty file of ours, for QEMU to write into.
fn new_picture(run_dir: &Path) -> store::Result<Arc<dyn Store>> {
    let folder = HostFolder::open(run_dir)?;
    match folder.unlink(PICTURE) {
        Err(error) if error.kind != ErrorKind::NotFound => Err(error),
        _ => folder.create(PICTURE),
    }
}

/// What a person is told of memory that does not come.
fn waits(Problem { message, hint, .. }: &Problem) -> String {
    let hint = hint.as_ref().map_or_else(String::new, |hint| format!("; without it: {hint}"));
    format!("a part of the guest's memory cannot be read, and it waits for it: {message}{hint}")
}

/// The QEMU of this host.
async fn installed(name: &str) -> Result<Installed, Problem> {
    Installed::find_noted(&Root::qemu_note()).await.map_err(|e| qemu_problem(name, &e))
}
