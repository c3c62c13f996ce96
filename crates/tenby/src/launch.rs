//! `tenby launch … -- QEMU …`: this program becomes a QEMU that may do less (see `qemu::Confined`). The worker starts it.

use clap::Args;
use machine::request::Problem;
use qemu::Confined;
use std::ffi::OsString;
use std::path::PathBuf;

/// What is given up and handed over first.
#[derive(Debug, Clone, Args)]
pub(crate) struct Launch {
    /// The number of the user to become, and of its group
    #[arg(long, value_name = "NUMBER")]
    user: Option<u32>,
    /// A device that this user may use
    #[arg(long, value_name = "NODE")]
    device: Vec<PathBuf>,
    /// A file that it is given open, to be read
    #[arg(long)]
    file: Vec<PathBuf>,
    /// Let it listen on ports below 1024
    #[arg(long)]
    low_ports: bool,
    /// Let it track memory by a privilege, for want of a device
    #[arg(long)]
    tracks: bool,
    /// Where to write the process's id
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// The program to become
    #[arg(last = true, required = true)]
    program: Vec<OsString>,
}

impl Launch {
    /// Becomes it, or says why not.
    pub(crate) fn run(self) -> Problem {
        let Self { user, device, file, low_ports, tracks, pid_file, program } = self;
        let confined = Confined { user, devices: device, files: file, low_ports, tracks, pid_file };
        let (program, args) = program.split_first().expect("one is required");
        Problem::failed(format!("{:#}", anyhow::Error::from(confined.becomes(program, args))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use std::os::unix::ffi::OsStringExt;
    use std::path::Path;

    /// The worker's words for what it wants come here as what it wanted.
    #[test]
    fn what_was_asked_for_is_understood() {
        let odd = OsString::from_vec(b"--a \xff,.iso".to_vec());
        let wanted = Confined {
            user: Some(2_013_265_921),
            devices: vec!["/dev/userfaultfd".into(), "/dev/kvm".into()],
            files: vec![Path::new("/iso").join(&odd), "/boot/kernel".into()],
            low_ports: true,
            tracks: true,
            pid_file: Some("qemu.pid".into()),
        };
        for wanted in [wanted, Confined::default()] {
            let args = ["-S".into(), "--user".into(), "--".into(), odd.clone()];
            let words = wanted.words(Path::new("/usr/bin/qemu"), &args);
            let cli = Cli::try_parse_from(std::iter::once("tenby".into()).chain(words)).expect("it is understood");
            let Some(Command::Launch(Launch { user, device, file, low_ports, tracks, pid_file, program })) =
                cli.command
            else {
                panic!("another command")
            };
            assert_eq!(Confined { user, devices: device, files: file, low_ports, tracks, pid_file }, wanted);
            assert_eq!(program, [&["/usr/bin/qemu".into()], &args[..]].concat());
        }
    }
}
