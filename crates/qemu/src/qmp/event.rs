//! What QEMU tells without being asked.

use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::broadcast;

/// A moment: microseconds since 1970 by the host's clock (`CLOCK_REALTIME`). QEMU stamps its events with it, so that they compare with
/// stamps taken by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp(u64);

impl Stamp {
    /// This moment.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(since.as_micros() as u64)
    }

    /// A moment given in microseconds since 1970.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// Microseconds from `earlier` to this moment; 0 if it is later.
    pub const fn micros_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// When; `None` if QEMU could not tell.
    pub at: Option<Stamp>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// The guest stands still.
    Stop,
    /// The guest is about to run.
    Resume,
    /// The guest powered off, or QEMU was asked to end.
    Shutdown {
        /// Whether the guest did it.
        guest: bool,
        /// QEMU's word for why: `guest-shutdown`, `host-qmp-quit`, …
        reason: String,
    },
    /// The guest starts anew.
    Reset {
        /// Whether the guest did it.
        guest: bool,
    },
    /// The guest was asked to power off.
    Powerdown,
    /// A capture or a restore went on.
    Migration(MigrationStatus),
    /// The guest reports its own death.
    GuestPanicked,
    /// A disk's request failed.
    BlockIoError {
        /// The disk's node name.
        node: String,
        /// Whether the guest is stopped for it.
        stops: bool,
        /// QEMU's words.
        reason: String,
    },
    /// Anything else, by QEMU's name.
    Other(String, Value),
}

/// How far a capture or a restore is, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    /// None ever ran.
    #[default]
    None,
    /// It begins.
    Setup,
    /// A cancel takes effect.
    Cancelling,
    /// It was cancelled.
    Cancelled,
    /// Memory is moved.
    Active,
    /// The guest runs, pages come when it asks for them.
    PostcopyActive,
    /// The source of pages is gone; the guest runs until it needs one.
    PostcopyPaused,
    /// A new source of pages takes over.
    PostcopyRecover,
    /// It reached its end.
    Completed,
    /// It failed.
    Failed,
    /// The guest stands still, and the rest waits for an order to move.
    PreSwitchover,
    /// The rest moves, the guest stands still.
    Device,
    /// Any other word.
    #[serde(other)]
    Other,
}

impl MigrationStatus {
    /// Whether nothing comes after it.
    pub const fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

impl Event {
    pub(crate) fn new(name: String, data: Value, at: Option<u64>) -> Self {
        let word = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
        let flag = |key: &str| data[key].as_bool().unwrap_or_default();
        let kind = match name.as_str() {
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "SHUTDOWN" => EventKind::Shutdown { guest: flag("guest"), reason: word("reason") },
            "RESET" => EventKind::Reset { guest: flag("guest") },
            "POWERDOWN" => EventKind::Powerdown,
            "MIGRATION" => {
                EventKind::Migration(MigrationStatus::deserialize(&data["status"]).unwrap_or(MigrationStatus::Other))
            }
            "GUEST_PANICKED" => EventKind::GuestPanicked,
            "BLOCK_IO_ERROR" => EventKind::BlockIoError {
                node: word("node-name"),
                stops: data["action"] == "stop",
                reason: word("reason"),
            },
            _ => EventKind::Other(name, data),
        };
        Self { kind, at: at.map(Stamp) }
    }
}

/// The events from the moment of subscription on.
#[derive(Debug)]
pub struct Events(Option<broadcast::Receiver<Event>>);

impl Events {
    pub(super) fn new(receiver: Option<broadcast::Receiver<Event>>) -> Self {
        Self(receiver)
    }

    /// The next event. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// [`Error::Disconnected`] at the end of the connection; [`Error::EventsMissed`] if the subscriber was so slow that some were dropped.
    pub async fn next(&mut self) -> Result<Event> {
        let Some(receiver) = &mut self.0 else { return Err(Error::Disconnected) };
        receiver.recv().await.map_err(|error| match error {
            broadcast::error::RecvError::Closed => Error::Disconnected,
            broadcast::error::RecvError::Lagged(count) => Error::EventsMissed(count),
        })
    }
}
