//! Debian packages that are unpacked beside the system, not installed into it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{call, output_of};

/// Downloads `packages` as `apt` (a command line of apt-get, up to its verb) would, and unpacks them all into `to`, unless that is
/// done already. `to` appears only when it is complete.
pub(crate) fn unpack(apt: &Apt, packages: &[String], to: &Path) -> Result<()> {
    let wanted = packages.join("\n");
    let stamp = to.join("packages");
    if fs::read_to_string(&stamp).is_ok_and(|have| have == wanted) {
        return Ok(());
    }
    let making = to.with_extension("making");
    let downloads = making.join("downloads");
    remove(&making)?;
    remove(to)?;
    fs::create_dir_all(&downloads)?;
    call(apt.command("apt-get").args(["-qq", "download"]).args(packages).current_dir(&downloads))
        .context("cannot download")?;
    for file in fs::read_dir(&downloads)? {
        call(Command::new("dpkg").arg("-x").arg(file?.path()).arg(&making))?;
    }
    remove(&downloads)?;
    fs::write(making.join("packages"), wanted)?;
    fs::rename(&making, to)?;
    Ok(())
}

/// How apt is asked: the system's own lists, or lists of ours.
#[derive(Default)]
pub(crate) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// The same question to another set of lists.
    pub(crate) fn with_options(options: Vec<String>) -> Self {
        Self { options }
    }

    /// `program` (apt-get, apt-cache) with our options.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // Root's downloads go to folders that apt's own user may not enter; it would say so each time.
        command.args(["-o", "APT::Sandbox::User=root"]).args(self.options.iter().flat_map(|option| ["-o", option]));
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The first package that `package` depends on and whose name begins with `prefix`: what a metapackage stands for.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let depends = output_of(self.command("apt-cache").args(["depends", package]))?;
        let mut named = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
        match named.find(|name| name.starts_with(prefix)) {
            Some(name) => Ok(name.to_owned()),
            None => bail!("apt knows no {prefix}… behind {package}"),
        }
    }
}

/// The one file below `folder` whose name is accepted by `is`.
pub(crate) fn find(folder: &Path, is: &dyn Fn(&str) -> bool) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find(&entry.path(), is)? {
                return Ok(Some(found));
            }
        } else if is(&entry.file_name().to_string_lossy()) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Removes a folder that may not be there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| folder.display().to_string())
        }
        _ => Ok(()),
    }
}
