//! Debian packages: which there are, and how they are unpacked beside the system without being installed.
//!
//! The package lists are our own, in target/debian: they also know backports, whatever the system's sources say, need no root, and
//! leave the system's lists alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{call, output_of, target};

/// Lists younger than this are not fetched again.
const FRESH: Duration = Duration::from_secs(3600);
const STATUS: &str = "/var/lib/dpkg/status";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with our lists.
pub(crate) struct Apt {
    options: Vec<String>,
    /// The suite that holds newer versions for this release: `bookworm-backports`.
    pub(crate) backports: String,
}

impl Apt {
    /// Fetches the lists, unless they are fresh.
    pub(crate) fn open() -> Result<Self> {
        let folder = target().join("debian/lists");
        let sources = target().join("debian/sources");
        let apt = Self {
            options: vec![
                format!("Dir::State::Lists={}", folder.display()),
                format!("Dir::Etc::SourceParts={}", sources.display()),
                // Nothing of ours is written outside our folder, even by root.
                "Dir::Cache::pkgcache=".to_owned(),
                "Dir::Cache::srcpkgcache=".to_owned(),
                // Root's downloads go to folders that apt's own user may not enter.
                "APT::Sandbox::User=root".to_owned(),
            ],
            backports: format!("{}-backports", codename()?),
        };
        let fresh = |stamp: &Path| -> Result<bool> { Ok(fs::metadata(stamp)?.modified()?.elapsed()? < FRESH) };
        let stamp = folder.join("fetched");
        if !fresh(&stamp).unwrap_or(false) {
            apt.fetch_lists(&folder, &sources)?;
            fs::write(stamp, "")?;
        }
        Ok(apt)
    }

    fn fetch_lists(&self, folder: &Path, sources: &Path) -> Result<()> {
        remove(sources)?;
        fs::create_dir_all(sources)?;
        fs::create_dir_all(folder.join("partial"))?;
        for file in fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten() {
            let file = file?;
            fs::copy(file.path(), sources.join(file.file_name()))?;
        }
        self.update()?;
        // Which mirror the system uses is known only now.
        let question = ["indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"];
        let known = output_of(self.command("apt-get").args(question))?;
        if !known.lines().any(|line| line.starts_with(&self.backports)) {
            let release = self.backports.trim_end_matches("-backports");
            let mirror = known.lines().find_map(|line| line.strip_prefix(&format!("{release} main ")));
            let mirror = mirror.with_context(|| format!("apt's sources do not name a mirror of {release}"))?;
            let source = format!("deb [signed-by={KEYRING}] {mirror} {} main\n", self.backports);
            fs::write(sources.join("backports.list"), source)?;
            self.update()?;
        }
        Ok(())
    }

    fn update(&self) -> Result<()> {
        call(self.command("apt-get").args(["-qq", "update"])).context("cannot fetch the lists of packages")
    }

    /// `program` (apt-get, apt-cache) with our lists.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(self.options.iter().flat_map(|option| ["-o", option]));
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

    /// `package` and what it needs beyond what is installed, as `name=version`, if it were installed from `suite` on this system,
    /// where nothing with `family` in its name were installed: that may be of a version which it does not go with.
    pub(crate) fn closure(&self, package: &str, suite: &str, family: &str) -> Result<Vec<String>> {
        let installed = fs::read_to_string(STATUS).context(STATUS)?;
        let status = target().join("debian/status");
        fs::write(&status, without(&installed, family)).with_context(|| status.display().to_string())?;
        let simulated = ["-s", "--no-install-recommends", "--allow-downgrades", "install"];
        let mut apt = self.command("apt-get");
        apt.arg("-o").arg(format!("Dir::State::status={}", status.display())).args(["-t", suite]).args(simulated);
        let said = output_of(apt.arg(format!("{package}/{suite}")))?;
        Ok(installations(&said))
    }

    /// Downloads `packages` and unpacks them all into `to`, unless that is done already. `to` appears only when it is complete.
    pub(crate) fn unpack(&self, packages: &[String], to: &Path) -> Result<()> {
        let making = to.with_extension("making");
        let downloads = making.join("downloads");
        remove(&making)?;
        remove(to)?;
        fs::create_dir_all(&downloads)?;
        call(self.command("apt-get").args(["-qq", "download"]).args(packages).current_dir(&downloads))?;
        for file in fs::read_dir(&downloads)? {
            call(Command::new("dpkg").arg("-x").arg(file?.path()).arg(&making))?;
        }
        remove(&downloads)?;
        fs::rename(&making, to).with_context(|| to.display().to_string())
    }
}

/// dpkg's status without the packages that have `family` in their names, and those that depend on them.
fn without(status: &str, family: &str) -> String {
    let names = |line: &str| ["Package:", "Depends:", "Pre-Depends:"].iter().any(|field| line.starts_with(field));
    let stays = |package: &&str| !package.lines().any(|line| names(line) && line.contains(family));
    status.split("\n\n").filter(stays).collect::<Vec<_>>().join("\n\n")
}

/// What apt's simulation says it would install: `Inst NAME [OLD] (NEW …`.
fn installations(said: &str) -> Vec<String> {
    let wish = |line: &str| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
        let version = rest.split_once('(')?.1.split_whitespace().next()?;
        Some(format!("{name}={version}"))
    };
    said.lines().filter_map(wish).collect()
}

/// The name of this Debian release: `bookworm`.
pub(crate) fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("this is no Debian: there is no /etc/os-release")?;
    let name = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release does not name its release")?.trim_matches('"').to_owned())
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
pub(crate) fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| folder.display().to_string())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{installations, without};

    #[test]
    fn a_family_is_as_if_it_were_not_installed() {
        let (libc, data) =
            ("Package: libc6\nVersion: 2\nDescription: not qemu", "Package: qemu-system-data\nVersion: 10");
        let user = "Package: virt-thing\nDepends: libc6, qemu-system-x86 (>= 1)";
        let status = [libc, data, user, libc].join("\n\n") + "\n";
        assert_eq!(without(&status, "qemu"), [libc, libc].join("\n\n") + "\n");
    }

    #[test]
    fn a_simulation_is_read() {
        let said = "Reading package lists...\nInst seabios [1.16.2-1] (1.16.3-2~bpo12+1 Debian Backports [all])\nConf seabios (1)\n\
                    Remv qemu-utils [1:10.0]\nInst liburing2 (2.3-3 Debian:12.15/oldstable [amd64]) []\nInst broken\n";
        assert_eq!(installations(said), ["seabios=1.16.3-2~bpo12+1", "liburing2=2.3-3"]);
    }
}
