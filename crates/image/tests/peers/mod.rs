//! Others that read image files: qemu-img and 7-Zip. What each gets wrong is its caller's affair.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs a tool; `None`, with a note, if it is not installed.
fn tool(name: &str, args: &[&str]) -> Option<Output> {
    let output = Command::new(name).args(args).stdin(Stdio::null()).output();
    match output {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: {name} is not installed");
            None
        }
        Err(error) => panic!("{name}: {error}"),
    }
}

/// Runs a tool that must be content; `None` if it is not installed.
pub(crate) fn content(name: &str, args: &[&str]) -> Option<Vec<u8>> {
    let output = tool(name, args)?;
    let words = String::from_utf8_lossy(&output.stderr).into_owned()
        + &String::from_utf8_lossy(&output.stdout[..output.stdout.len().min(2000)]);
    assert!(output.status.success(), "{name} {args:?}: {words}");
    Some(output.stdout)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// An image's content as 7-Zip reads it. 7-Zip finds a parent by its name beside the child.
pub(crate) fn seven_zip(path: &Path) -> Option<Vec<u8>> {
    // Else it looks into the file system that it may find on the disk.
    let as_image = if text(path).ends_with("vhd") { "-tVHD" } else { "-tVHDX" };
    content("7z", &["t", as_image, text(path)])?;
    content("7z", &["e", "-so", as_image, text(path)])
}

/// A VHDX's content as qemu-img reads it, which knows no parents.
pub(crate) fn qemu(path: &Path) -> Option<Vec<u8>> {
    let info = content("qemu-img", &["info", "--output=json", text(path)])?;
    assert!(String::from_utf8_lossy(&info).contains(r#""format": "vhdx""#));
    content("qemu-img", &["check", "-f", "vhdx", text(path)])?;
    qemu_bytes(path, &format!("driver=vhdx,file.filename={}", text(path)))
}

/// A VHD's content as qemu-img reads it, which knows no parents.
pub(crate) fn qemu_vhd(path: &Path) -> Option<Vec<u8>> {
    // QEMU before 10 takes the size of creators that it does not know from the geometry.
    qemu_bytes(path, &format!("driver=vpc,force_size_calc=current_size,file.filename={}", text(path)))
}

fn qemu_bytes(path: &Path, image: &str) -> Option<Vec<u8>> {
    let raw = path.with_extension("from-qemu");
    content("qemu-img", &["convert", "--image-opts", image, "-O", "raw", text(&raw)])?;
    let bytes = fs::read(&raw).expect("qemu-img wrote it");
    fs::remove_file(raw).expect("removed");
    Some(bytes)
}
