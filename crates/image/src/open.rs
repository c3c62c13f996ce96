//! Opening an image file: which format it is, and its lock.

use crate::layer::{Format, Layer};
use crate::{Error, ErrorKind, Result, raw, vhd, vhdx};
use std::sync::Arc;
use store::{Lock, Mode, Store};

/// What a file's signature says that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signature {
    /// A VHDX.
    Vhdx,
    /// A VHD.
    Vhd,
    /// Another image format, by its name.
    Foreign(&'static str),
}

/// Signatures of image formats: offset, bytes, and what they mean.
const SIGNATURES: [(u64, &[u8], Signature); 6] = [
    (0, b"vhdxfile", Signature::Vhdx),
    (0, b"QFI\xfb", Signature::Foreign("qcow2")),
    (0, &vhd::FOOTER_COOKIE, Signature::Vhd),
    (0, b"KDMV", Signature::Foreign("VMDK")),
    (0, b"# Disk DescriptorFile", Signature::Foreign("VMDK")),
    (64, b"\x7f\x10\xda\xbe", Signature::Foreign("VDI")),
];

/// What the file's signature says; `None` if it has none that we know.
pub fn probe(store: &dyn Store) -> Result<Option<Signature>> {
    let length = store.len()?;
    let has = |at: u64, signature: &[u8]| {
        if at + signature.len() as u64 > length {
            return Ok(false);
        }
        let mut bytes = vec![0; signature.len()];
        store.read_at(&mut bytes, at).map(|()| bytes == signature)
    };
    for (at, bytes, signature) in SIGNATURES {
        if has(at, bytes)? {
            return Ok(Some(signature));
        }
    }
    // A fixed VHD has its signature at its end only.
    for at in vhd::TAIL_LENGTHS.into_iter().filter_map(|footer| length.checked_sub(footer)) {
        if has(at, &vhd::FOOTER_COOKIE)? {
            return Ok(Some(Signature::Vhd));
        }
    }
    Ok(None)
}

/// Opens an image, locked: exclusively for [`Mode::Write`], else shared. Its format is the one that its signature says; a file
/// without a signature is opened only if `format` says [`Format::Raw`].
///
/// # Errors
/// [`ErrorKind::Locked`] if somebody else uses the file, [`ErrorKind::Unsigned`] if there is no signature and `format` does not say
/// raw, [`ErrorKind::Unsupported`] if the signature is of another format (named), or is not of the `format` that was asked for.
pub fn open(store: Arc<dyn Store>, format: Option<Format>, mode: Mode) -> Result<Arc<dyn Layer>> {
    store.lock(if mode == Mode::Write { Lock::Exclusive } else { Lock::Shared })?;
    open_unlocked(store, format, mode)
}

/// [`open`] without a lock: for a look at what an image says of itself while others may be using it, or by who keeps others out.
pub fn open_unlocked(store: Arc<dyn Store>, format: Option<Format>, mode: Mode) -> Result<Arc<dyn Layer>> {
    let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, store.name(), message));
    match (probe(&*store)?, format) {
        (Some(Signature::Vhdx), None | Some(Format::Vhdx)) => Ok(vhdx::open(store, mode)?),
        (Some(Signature::Vhd), None | Some(Format::Vhd)) => Ok(vhd::open(store, mode)?),
        (None, Some(Format::Raw)) => Ok(raw::open(store, mode)?),
        (None, None | Some(Format::Vhd)) if vhd::is_padded(&*store)? => Ok(vhd::open(store, mode)?),
        (None, _) if store.is_empty()? => {
            Err(Error::new(ErrorKind::Damaged, store.name(), "it is empty, and no image"))
        }
        (Some(known @ (Signature::Vhdx | Signature::Vhd)), Some(said)) => {
            let (known, said) = (if known == Signature::Vhd { "VHD" } else { "VHDX" }, said.name());
            refuse(format!(
                "it was to be read as {said}, but its signature says {known}: name it so, or remove the signature"
            ))
        }
        (Some(Signature::Foreign(name)), Some(Format::Raw)) => {
            refuse(format!("it was to be read as raw, but its signature says {name}: convert it first"))
        }
        (Some(Signature::Foreign(name)), _) => refuse(format!("it is a {name} image, which is not read here yet")),
        (None, Some(Format::Vhdx)) => refuse("it is no VHDX: the signature is missing".to_owned()),
        (None, Some(Format::Vhd)) => refuse("it is no VHD: there is no footer, nor a copy of one".to_owned()),
        (None, _) => Err(Error::new(
            ErrorKind::Unsigned,
            store.name(),
            "it has no signature of an image format; a raw disk is read only if it is said to be one (and a fixed VHD whose end was lost \
             looks like it)",
        )),
    }
}
