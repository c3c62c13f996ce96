//! Commands that parse and are refused until their time comes, and the demo.

use super::words;
use clap::{Args, Subcommand, ValueEnum};
use machine::request::Problem;
use machine::tree::LayerFormat;
use std::path::Path;

/// The names of Hyper-V's cmdlets that Tenby will answer to.
pub(super) const CMDLETS: [&str; 27] = [
    "Checkpoint-VMSnapshot",
    "Export-VM",
    "Export-VMSnapshot",
    "Get-VHD",
    "Get-VM",
    "Get-VMCheckpoint",
    "Get-VMSnapshot",
    "Import-VM",
    "Merge-VHD",
    "New-VHD",
    "New-VM",
    "Remove-VM",
    "Remove-VMCheckpoint",
    "Remove-VMSnapshot",
    "Rename-VM",
    "Rename-VMCheckpoint",
    "Rename-VMSnapshot",
    "Restart-VM",
    "Restore-VMCheckpoint",
    "Restore-VMSnapshot",
    "Resume-VM",
    "Save-VM",
    "Set-VM",
    "Start-VM",
    "Stop-VM",
    "Suspend-VM",
    "Test-VHD",
];

/// Words that are somebody else's to understand.
#[derive(Debug, Args)]
pub(crate) struct Anything {
    /// As PowerShell would have them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    words: Vec<String>,
}

/// `tenby serve`
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
}

/// `tenby token`
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    /// Make a token; it is printed once
    #[command(after_help = "Example:\n  tenby token create ci --role operate")]
    Create {
        /// Its name
        name: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: Role,
    },
    /// List the tokens
    #[command(after_help = "Example:\n  tenby token list")]
    List,
    /// Take a token back
    #[command(after_help = "Example:\n  tenby token revoke ci")]
    Revoke {
        /// Its name
        name: String,
    },
}

/// What a token may do.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Role {
    /// Look
    View,
    /// Run machines and take snapshots
    Operate,
    /// Everything
    Admin,
}

/// `tenby demo`
#[derive(Debug, Subcommand)]
pub(crate) enum Demo {
    /// Monday to Friday in the life of a virtual machine, with its snapshots
    #[command(after_help = "Examples:\n  tenby demo week\n  tenby demo week --format vhd")]
    Week {
        /// The format of its disks: vhdx or vhd
        #[arg(long, value_name = "FORMAT", default_value = "vhdx", value_parser = words::layer_format)]
        format: LayerFormat,
    },
}

impl Demo {
    pub(crate) async fn run(self, root: Option<&Path>) -> Result<(), Problem> {
        match self {
            Self::Week { format } => crate::demo::week(root, format).await,
        }
    }
}
