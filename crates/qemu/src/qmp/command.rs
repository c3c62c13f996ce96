//! The commands that Tenby gives, typed. Each one's errors are those of [`Qmp::execute`].

use super::event::MigrationStatus;
use super::{Qmp, Value, json};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;

/// What `query-status` tells.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// Whether the guest runs.
    pub running: bool,
    /// QEMU's word: `running`, `paused`, `inmigrate`, …
    pub status: String,
}

/// What `query-migrate` tells.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// How far it is.
    #[serde(default)]
    pub status: MigrationStatus,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// Why a capture would be refused now.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
    /// How long the preparation took, milliseconds.
    pub setup_time: Option<u64>,
    /// How long it took, milliseconds.
    pub total_time: Option<u64>,
}

/// A block node, as `query-named-block-nodes` tells.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockNode {
    /// Its name.
    pub node_name: String,
    /// Its driver.
    pub drv: String,
    /// Its size and the like.
    pub image: BlockImage,
}

/// A block node's image.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockImage {
    /// Bytes.
    pub virtual_size: u64,
}

/// A capability of migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// MIGRATION events.
    Events,
    /// The guest runs on while its memory as of one moment is written.
    BackgroundSnapshot,
    /// The guest runs before its memory is complete.
    PostcopyRam,
    /// The guest stands still, and an order is waited for, before the rest of it is moved.
    PauseBeforeSwitchover,
}

impl Capability {
    fn name(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::BackgroundSnapshot => "background-snapshot",
            Self::PostcopyRam => "postcopy-ram",
            Self::PauseBeforeSwitchover => "pause-before-switchover",
        }
    }
}

impl Qmp {
    /// What the machine does.
    pub async fn status(&self) -> Result<Status> {
        self.execute("query-status", Value::Null).await
    }

    /// Whether its processors run by KVM.
    pub async fn runs_by_kvm(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Kvm {
            enabled: bool,
        }
        self.execute::<Kvm>("query-kvm", Value::Null).await.map(|kvm| kvm.enabled)
    }

    /// Stops the guest; its disks are drained and flushed when this returns.
    pub async fn stop(&self) -> Result<()> {
        self.order("stop", Value::Null).await
    }

    /// Lets the guest run.
    pub async fn cont(&self) -> Result<()> {
        self.order("cont", Value::Null).await
    }

    /// Presses the power button.
    pub async fn system_powerdown(&self) -> Result<()> {
        self.order("system_powerdown", Value::Null).await
    }

    /// Presses the reset button.
    pub async fn system_reset(&self) -> Result<()> {
        self.order("system_reset", Value::Null).await
    }

    /// Asks the process to end.
    pub async fn quit(&self) -> Result<()> {
        self.order("quit", Value::Null).await
    }

    /// Writes the screen as PNG. QEMU itself writes the file, which must be absolute and writable to it.
    pub async fn screendump(&self, file: &Path) -> Result<()> {
        let file = text(file)?;
        self.order("screendump", json!({ "filename": file, "format": "png" })).await
    }

    /// The block nodes.
    pub async fn block_nodes(&self) -> Result<Vec<BlockNode>> {
        self.execute("query-named-block-nodes", json!({ "flat": true })).await
    }

    /// Tells the guest the new size of a disk whose server has it already. An NBD node sees it only once it has reconnected.
    pub async fn block_resize(&self, node: &str, bytes: u64) -> Result<()> {
        self.order("block_resize", json!({ "node-name": node, "size": bytes })).await
    }

    /// The names of the character devices of which nobody holds the other end.
    pub async fn unconnected_chardevs(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Chardev {
            label: String,
            filename: String,
        }
        let all: Vec<Chardev> = self.execute("query-chardev", Value::Null).await?;
        Ok(all
            .into_iter()
            .filter(|chardev| chardev.filename.starts_with("disconnected:"))
            .map(|chardev| chardev.label)
            .collect())
    }

    /// Gives an order to the monitor for people, which answers in prose (nothing, if all went well, for most orders).
    pub async fn human(&self, order: &str) -> Result<String> {
        self.execute("human-monitor-command", json!({ "command-line": order })).await
    }

    /// Sets capabilities of migration; refused while one runs.
    pub async fn set_capabilities(&self, wanted: &[(Capability, bool)]) -> Result<()> {
        let list: Vec<_> =
            wanted.iter().map(|(which, on)| json!({ "capability": which.name(), "state": on })).collect();
        self.order("migrate-set-capabilities", json!({ "capabilities": list })).await
    }

    /// Lifts the limit on migration's speed, bytes per second.
    pub async fn set_bandwidth(&self, bytes_per_second: u64) -> Result<()> {
        self.order("migrate-set-parameters", json!({ "max-bandwidth": bytes_per_second })).await
    }

    /// How long the guest may stand still while the rest of its memory is moved, as far as QEMU can tell before.
    pub async fn set_downtime(&self, most: Duration) -> Result<()> {
        self.order("migrate-set-parameters", json!({ "downtime-limit": most.as_millis() as u64 })).await
    }

    /// Lets a migration go on that waits in [`MigrationStatus::PreSwitchover`].
    pub async fn migrate_continue(&self) -> Result<()> {
        self.order("migrate-continue", json!({ "state": "pre-switchover" })).await
    }

    /// Begins to send the machine into a descriptor passed before.
    pub async fn migrate_to(&self, descriptor: &str) -> Result<()> {
        self.order("migrate", json!({ "uri": format!("fd:{descriptor}") })).await
    }

    /// Begins to receive the machine from a descriptor passed before.
    pub async fn migrate_from(&self, descriptor: &str) -> Result<()> {
        self.order("migrate-incoming", json!({ "uri": format!("fd:{descriptor}") })).await
    }

    /// Goes on receiving the machine's memory from a descriptor passed before.
    pub async fn migrate_again(&self, descriptor: &str) -> Result<()> {
        self.order("migrate-recover", json!({ "uri": format!("fd:{descriptor}") })).await
    }

    /// Cancels what is being sent.
    pub async fn migrate_cancel(&self) -> Result<()> {
        self.order("migrate_cancel", Value::Null).await
    }

    /// How far a migration is.
    pub async fn migration(&self) -> Result<MigrationInfo> {
        self.execute("query-migrate", Value::Null).await
    }

    /// Whether a migration, in or out, still holds anything; also for a moment after its end.
    pub async fn migration_held(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Instance {
            r#type: String,
        }
        let all: Vec<Instance> = self.execute("query-yank", Value::Null).await?;
        Ok(all.iter().any(|instance| instance.r#type == "migration"))
    }

    /// Plugs the network card's cable in or out.
    pub async fn set_link(&self, device: &str, up: bool) -> Result<()> {
        self.order("set_link", json!({ "name": device, "up": up })).await
    }

    async fn order(&self, command: &str, arguments: Value) -> Result<()> {
        let _: Value = self.execute(command, arguments).await?;
        Ok(())
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::Unsupported(format!("QMP cannot carry the path {}", path.display())))
}
