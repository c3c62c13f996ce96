//! The words that arguments are made of: sizes, times, names, disks, ports.

use machine::request::{DiskSource, DiskSpec, Problem};
use machine::tree::{Bus, DiskId, LayerFormat, Publish};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A size in bytes: `512M`, `20G` (binary units), `1048576`.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = unit.strip_suffix("iB").unwrap_or(unit);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => return Err("a size is a number of bytes or ends in K, M, G, T or P: 512M, 20G".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "a size begins with a whole number: 512M, 20G".to_owned())?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes <= 1 << 60)
        .ok_or_else(|| "that is larger than any disk or memory".to_owned())
}

/// A size that is not nothing.
pub(crate) fn some_size(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| if bytes == 0 { Err("it must not be 0".to_owned()) } else { Ok(bytes) })
}

/// A time: `60s`, `500ms`, `2m`, `1h`; a bare number is seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 6] =
        [("ms", 1), ("", 1000), ("s", 1000), ("m", 60_000), ("min", 60_000), ("h", 3_600_000)];
    let ms = in_units(text, &UNITS).ok_or("a time is a number and s, ms, m or h: 60s, 2m")?;
    if ms <= 7 * 86_400_000 { Ok(Duration::from_millis(ms)) } else { Err("a week at most".to_owned()) }
}

/// How long something can be taken back, in seconds: `0`, `30m`, `1h`, `7d`; a year at most.
pub(crate) fn undo_time(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 6] = [("", 1), ("s", 1), ("m", 60), ("min", 60), ("h", 3600), ("d", 86_400)];
    let wrong = "a time is a number and s, m, h or d: 30m, 1h, 7d; 0 for not at all";
    let seconds = in_units(text, &UNITS).ok_or(wrong)?;
    if seconds <= 366 * 86_400 { Ok(seconds) } else { Err("a year at most".to_owned()) }
}

/// A number and a unit of these, as so many times the number; what is too much is as much as there is.
fn in_units(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, times) = units.iter().find(|(name, _)| *name == unit)?;
    Some(number.parse::<u64>().ok()?.saturating_mul(*times))
}

/// A name for something new: 1 to 100 characters, no `/`, `@`, control characters or leading `-`.
pub(crate) fn new_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().count() > 100 {
        return Err("a name has 1 to 100 characters".to_owned());
    }
    if text.starts_with('-') || text.contains(['/', '@']) || text.chars().any(char::is_control) {
        return Err("a name has no /, @ or control characters and does not begin with -".to_owned());
    }
    if text.trim() != text {
        return Err("a name does not begin or end with a space".to_owned());
    }
    Ok(text.to_owned())
}

/// The name of something that is there: by name, id, or the beginning of an id. A full id may be written with its hyphens.
#[expect(clippy::unnecessary_wraps, reason = "clap's signature")]
pub(crate) fn name(text: &str) -> Result<String, String> {
    match uuid::Uuid::parse_str(text) {
        Ok(id) => Ok(id.simple().to_string()),
        Err(_) => Ok(text.to_owned()),
    }
}

/// A disk as it is written on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    source: Source,
    format: Option<String>,
    /// Folders in which a copied file's parents may lie, besides its own.
    parents: Vec<PathBuf>,
    bus: Bus,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    New(u64),
    File { path: PathBuf, in_place: bool },
}

/// Parses `new:SIZE`, `FILE` or `FILE,in-place`, each with `,format=F` and `,bus=B`; `FILE` with `,parents=FOLDER` as often as one likes.
/// Options are read from the end, so that a file's name may hold commas.
pub(crate) fn disk(text: &str) -> Result<DiskArg, String> {
    let mut rest = text;
    let (mut format, mut bus, mut in_place, mut parents) = (None, None, false, Vec::new());
    while let Some((before, option)) = rest.rsplit_once(',') {
        match option.split_once('=') {
            Some(("format", value)) => format = Some(known_format(value)?),
            Some(("bus", value)) => bus = Some(known_bus(value)?),
            Some(("parents", value)) => parents.insert(0, PathBuf::from(value)),
            None if option == "in-place" => in_place = true,
            _ => break,
        }
        rest = before;
    }
    let source = match rest.strip_prefix("new:") {
        Some(_) if in_place => return Err("a new disk is not taken in place".to_owned()),
        Some(bytes) => Source::New(some_size(bytes)?),
        None if rest.is_empty() => return Err("a disk is new:SIZE or a file".to_owned()),
        None => Source::File { path: PathBuf::from(rest), in_place },
    };
    if !parents.is_empty() && !matches!(source, Source::File { in_place: false, .. }) {
        return Err("only a file that is copied in has parents elsewhere".to_owned());
    }
    Ok(DiskArg { source, format, parents, bus: bus.unwrap_or_default() })
}

fn known_format(text: &str) -> Result<String, String> {
    match text {
        "raw" | "vhd" | "vhdx" | "qcow2" => Ok(text.to_owned()),
        _ => Err("the formats are raw, vhd, vhdx and qcow2".to_owned()),
    }
}

/// The format of a new disk.
pub(crate) fn layer_format(text: &str) -> Result<LayerFormat, String> {
    match text {
        "vhdx" => Ok(LayerFormat::Vhdx),
        "vhd" => Ok(LayerFormat::Vhd),
        _ => Err("a new disk is vhdx or vhd".to_owned()),
    }
}

fn known_bus(text: &str) -> Result<Bus, String> {
    match text {
        "virtio" => Ok(Bus::Virtio),
        "sata" => Ok(Bus::Sata),
        "ide" => Ok(Bus::Ide),
        "scsi" => Ok(Bus::Scsi),
        _ => Err("the buses are virtio, sata, ide and scsi".to_owned()),
    }
}

impl DiskArg {
    /// What the machine is told. A file that does not exist is refused.
    pub(crate) fn spec(&self) -> Result<DiskSpec, Problem> {
        let source = match &self.source {
            Source::New(size) => {
                let format = self.format.as_deref().unwrap_or("vhdx");
                let format = layer_format(format).map_err(|why| Problem::usage(format!("{why}, not {format}")))?;
                DiskSource::New { size: *size, format }
            }
            Source::File { path, in_place } => {
                let path = existing_file(path)?;
                let format = self.format.clone();
                if *in_place {
                    DiskSource::InPlace { path, format }
                } else {
                    let parents = self.parents.iter().map(|folder| absolute(folder)).collect::<Result<_, _>>()?;
                    DiskSource::Copy { path, format, parents }
                }
            }
        };
        Ok(DiskSpec { source, bus: self.bus })
    }
}

/// The absolute path of a file that is there.
pub(crate) fn existing_file(path: &Path) -> Result<String, Problem> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Problem::not_found(format!("{}: no such file", path.display())))
        }
        Err(error) => Err(Problem::failed(format!("{}: {error}", path.display()))),
        Ok(about) if about.is_dir() => Err(Problem::damaged(format!("{} is a folder", path.display()))),
        Ok(_) => absolute(path),
    }
}

/// The absolute path, as text.
fn absolute(path: &Path) -> Result<String, Problem> {
    let absolute = std::path::absolute(path).map_err(|error| Problem::usage(format!("{}: {error}", path.display())))?;
    absolute.into_os_string().into_string().map_err(|_| Problem::usage(format!("{}: not UTF-8", path.display())))
}

/// Parses `[ADDR:]HOSTPORT:GUESTPORT`; an IPv6 address stands in brackets.
pub(crate) fn publish(text: &str) -> Result<Publish, String> {
    let wrong = || "write HOSTPORT:GUESTPORT or ADDR:HOSTPORT:GUESTPORT".to_owned();
    let (rest, guest) = text.rsplit_once(':').ok_or_else(wrong)?;
    let (address, host) = rest.rsplit_once(':').unwrap_or(("127.0.0.1", rest));
    let bare = address.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<std::net::IpAddr>().map_err(|_| format!("\"{address}\" is no address"))?;
    let port =
        |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(|| format!("\"{text}\" is no port"));
    Ok(Publish { address: bare.to_owned(), host: port(host)?, guest: port(guest)? })
}

/// Parses `ID=SIZE`.
pub(crate) fn grow(text: &str) -> Result<(DiskId, u64), String> {
    let (id, bytes) = text.split_once('=').ok_or_else(|| "write ID=SIZE: disk0=40G".to_owned())?;
    Ok((DiskId(id.to_owned()), some_size(bytes)?))
}

/// Parses `on` and `off`.
pub(crate) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".to_owned()),
    }
}

/// A disk's id.
#[expect(clippy::unnecessary_wraps, reason = "clap's signature")]
pub(crate) fn disk_id(text: &str) -> Result<DiskId, String> {
    Ok(DiskId(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("20g"), Ok(20 << 30));
        assert_eq!(size("4KiB"), Ok(4096));
        assert_eq!(size("1048576"), Ok(1 << 20));
        for wrong in ["", "G", "-1", "1.5G", "12X", "99999999999999999999", "9000P", "1 G"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(duration("60s"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "s", "1d", "-1s", "99999999999999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_to_take_something_back() {
        for (text, seconds) in
            [("0", 0), ("90", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800), ("366d", 31_622_400)]
        {
            assert_eq!(undo_time(text), Ok(seconds), "{text}");
        }
        for wrong in ["", "h", "1w", "-1h", "1.5h", "367d", "99999999999999999999h", "9999999999999999h"] {
            assert!(undo_time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_that_would_lead_astray_are_none() {
        for good in ["a", "Monday", "after the update (2)", "Käse", &"x".repeat(100)] {
            assert_eq!(new_name(good).as_deref(), Ok(good));
        }
        for wrong in ["", "-x", "a/b", "a@b", "a\nb", "a\u{7f}", " a", &"x".repeat(101), &"x".repeat(10_000)] {
            assert!(new_name(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_disk_is_new_or_a_file_and_a_files_name_may_hold_commas() {
        let new = disk("new:20G,bus=sata").unwrap();
        assert_eq!(new.source, Source::New(20 << 30));
        assert_eq!(new.bus, Bus::Sata);
        let file = disk("/srv/a,b.img,format=raw,in-place").unwrap();
        assert_eq!(file.source, Source::File { path: "/srv/a,b.img".into(), in_place: true });
        assert_eq!(file.format.as_deref(), Some("raw"));
        assert_eq!(disk("/srv/a,b=c").unwrap().source, Source::File { path: "/srv/a,b=c".into(), in_place: false });
        let child = disk("/srv/child.avhdx,parents=/srv/a,format=vhdx,parents=../b").unwrap();
        assert_eq!(child.parents, [PathBuf::from("/srv/a"), PathBuf::from("../b")]);
        assert!(disk("new:1G,parents=/srv").is_err() && disk("a.vhdx,in-place,parents=/srv").is_err());
        for wrong in ["", "new:", "new:0", "new:x", "new:1G,in-place", "a,format=zip", "a,bus=usb", ",in-place"] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_published_on_the_loopback_unless_said() {
        assert_eq!(publish("8080:80"), Ok(Publish { address: "127.0.0.1".to_owned(), host: 8080, guest: 80 }));
        assert_eq!(publish("0.0.0.0:8080:80").unwrap().address, "0.0.0.0");
        assert_eq!(publish("[::1]:8080:80").unwrap().address, "::1");
        for wrong in ["", "80", "0:80", "80:0", "x:1:2", "1:70000", "::"] {
            assert!(publish(wrong).is_err(), "{wrong}");
        }
    }
}
