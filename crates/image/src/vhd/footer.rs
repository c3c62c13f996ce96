//! The footer: finding the copy that counts, and making one.
//!
//! The footer at the file's end counts. A dynamic or differencing file begins with a copy of it, for the day on which the end is lost:
//! the end moves whenever the file grows.

use super::format::{
    CREATOR, CREATOR_VERSION, FEATURES, FOOTER_CHECKSUM, FOOTER_COOKIE, HOST, KIND_DIFFERENCING, KIND_DYNAMIC,
    KIND_FIXED, RawFooter, SECTOR, VERSION, checksum, geometry, now,
};
use crate::layer::Kind;
use crate::{Error, ErrorKind, Result};
use store::Store;
use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// A footer, as it lies in the file. What we do not know of it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Footer(RawFooter);

impl Footer {
    /// A new disk's footer.
    pub(crate) fn new(kind: Kind, size: u64, id: Uuid, header_at: u64) -> Self {
        let mut raw = RawFooter::new_zeroed();
        raw.cookie = FOOTER_COOKIE;
        raw.features = FEATURES.into();
        raw.version = VERSION.into();
        raw.data_offset = header_at.into();
        raw.timestamp = now().into();
        raw.host = HOST;
        raw.original_size = size.into();
        raw.kind = match kind {
            Kind::Fixed => KIND_FIXED,
            Kind::Dynamic => KIND_DYNAMIC,
            Kind::Differencing => KIND_DIFFERENCING,
        }
        .into();
        raw.id = id.into_bytes();
        Self(raw).resized(size)
    }

    fn sealed(mut self) -> Self {
        self.0.checksum = checksum(self.0.as_bytes(), FOOTER_CHECKSUM).into();
        self
    }

    /// The same with another id and another header.
    pub(crate) fn with(mut self, id: Uuid, header_at: u64) -> Self {
        self.0.id = id.into_bytes();
        self.0.data_offset = header_at.into();
        self.sealed()
    }

    /// The same in a file that is ours from now on: what others kept in it beside what the format says counts no more.
    pub(crate) fn adopted(mut self) -> Self {
        (self.0.creator, self.0.creator_version) = (CREATOR, CREATOR_VERSION.into());
        self.sealed()
    }

    /// The same with another size, in a file that is ours from now on: readers take the size of some creators from the geometry.
    pub(crate) fn resized(mut self, size: u64) -> Self {
        self.0.size = size.into();
        let (cylinders, heads, sectors) = geometry(size);
        (self.0.cylinders, self.0.heads, self.0.sectors) = (cylinders.into(), heads, sectors);
        self.adopted()
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The disk's own UUID.
    pub(crate) fn id(&self) -> Uuid {
        Uuid::from_bytes(self.0.id)
    }

    /// The disk's size in bytes, as it stands there.
    pub(crate) fn size(&self) -> u64 {
        self.0.size.get()
    }

    /// Where the header lies, as it stands there.
    pub(crate) fn header_at(&self) -> u64 {
        self.0.data_offset.get()
    }

    /// Whether we made the file: then nothing is in it that we do not know.
    pub(crate) fn is_ours(&self) -> bool {
        (self.0.creator, self.0.creator_version.get()) == (CREATOR, CREATOR_VERSION)
    }

    /// Fixed, dynamic or differencing; what else the number may be.
    pub(crate) fn kind(&self) -> std::result::Result<Kind, u32> {
        match self.0.kind.get() {
            KIND_FIXED => Ok(Kind::Fixed),
            KIND_DYNAMIC => Ok(Kind::Dynamic),
            KIND_DIFFERENCING => Ok(Kind::Differencing),
            other => Err(other),
        }
    }

    /// Whether it is of the version that we know.
    pub(crate) fn is_known_version(&self) -> bool {
        self.0.version.get() == VERSION
    }

    /// Whether a virtual machine was suspended with this disk.
    pub(crate) fn saved_state(&self) -> bool {
        self.0.saved_state != 0
    }

    /// Whether something else in the footer says the same size: the original size, or the geometry.
    pub(crate) fn size_agrees(&self) -> bool {
        let said = (self.0.cylinders.get(), self.0.heads, self.0.sectors);
        self.0.original_size == self.0.size || geometry(self.size()) == said
    }

    /// Whether its checksum is right.
    pub(crate) fn is_sealed(&self) -> bool {
        self.0.checksum.get() == checksum(self.bytes(), FOOTER_CHECKSUM)
    }

    /// A footer's bytes, all or all but the last, which old tools leave out; `None` without the signature.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut all = [0; SECTOR as usize];
        all[..bytes.len()].copy_from_slice(bytes);
        let raw = RawFooter::read_from_bytes(&all).ok()?;
        (raw.cookie == FOOTER_COOKIE).then_some(Self(raw))
    }
}

/// The footer that counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    pub(crate) footer: Footer,
    /// Where the copy at the end lies, bytes; `None` if it is lost.
    pub(crate) tail: Option<u64>,
    /// The copy at the end is the one that counts.
    pub(crate) tail_sound: bool,
    /// The copy at the beginning is there and equal to it. (A fixed file has none.)
    pub(crate) head_sound: bool,
    /// Its checksum is right. If not, it is good for looking only.
    pub(crate) sealed: bool,
}

/// A footer at the file's end is so long; those of Virtual PC before 2004 lack their last byte.
pub(crate) const TAIL_LENGTHS: [u64; 2] = [SECTOR, SECTOR - 1];

/// Finds the footer that counts.
///
/// # Errors
/// [`ErrorKind::Damaged`] if there is none.
pub(crate) fn find(store: &dyn Store) -> Result<Found> {
    let length = store.len()?;
    let at = |at: u64, length: u64| -> Result<Option<Footer>> {
        let mut bytes = vec![0; length as usize];
        store.read_at(&mut bytes, at)?;
        Ok(Footer::parse(&bytes))
    };
    let mut tail = None;
    for (start, bytes) in TAIL_LENGTHS.iter().filter_map(|bytes| Some((length.checked_sub(*bytes)?, *bytes))) {
        if tail.is_none() {
            tail = at(start, bytes)?.map(|footer| (footer, start));
        }
    }
    // A fixed disk's first sector is the guest's.
    let is_fixed = |footer: &Footer| footer.kind() == Ok(Kind::Fixed);
    let has_head = length >= SECTOR && !tail.is_some_and(|(tail, _)| is_fixed(&tail));
    let head = if has_head { at(0, SECTOR)?.filter(|head| !is_fixed(head)) } else { None };
    let sealed_tail = tail.filter(|(footer, _)| footer.is_sealed());
    let sealed_head = head.filter(Footer::is_sealed);
    let found = |footer: Footer, tail_sound: bool| Found {
        footer,
        tail: tail.map(|(_, at)| at),
        tail_sound,
        head_sound: head == Some(footer),
        sealed: footer.is_sealed(),
    };
    match (sealed_tail, sealed_head, tail, head) {
        (Some((footer, _)), ..) => Ok(found(footer, true)),
        (None, Some(footer), ..) => Ok(found(footer, false)),
        (None, None, Some((footer, _)), _) => Ok(found(footer, true)),
        (None, None, None, Some(footer)) => Ok(found(footer, false)),
        (None, None, None, None) => {
            let message = "it is no VHD: there is no footer, neither at its end nor at its beginning";
            let (footer, at) =
                before_zeros(store)?.ok_or_else(|| Error::new(ErrorKind::Damaged, store.name(), message))?;
            Ok(Found { footer, tail: Some(at), tail_sound: false, head_sound: false, sealed: true })
        }
    }
}

/// How far back a footer is looked for, in bytes from the last that is no hole: as far as people pad files.
const PADDING: u64 = 1 << 20;

/// The footer of a fixed disk behind which nothing but zeros lies, and where it lies. The file was cut off while it grew, its new length
/// durable and its new end not; or somebody has padded it.
pub(crate) fn before_zeros(store: &dyn Store) -> Result<Option<(Footer, u64)>> {
    let end = data_end(store)?;
    let from = end.saturating_sub(PADDING) / SECTOR * SECTOR;
    let mut bytes = vec![0; (end - from) as usize];
    store.read_at(&mut bytes, from)?;
    let Some(last) = bytes.iter().rposition(|byte| *byte != 0) else { return Ok(None) };
    let sector = last / SECTOR as usize * SECTOR as usize;
    bytes.resize(sector + SECTOR as usize, 0);
    let (footer, at) = (Footer::parse(&bytes[sector..]), from + sector as u64);
    let is_it = |footer: &Footer| footer.is_sealed() && footer.kind() == Ok(Kind::Fixed) && footer.size() <= at;
    Ok(footer.filter(is_it).map(|footer| (footer, at)))
}

/// The end of the last stretch of a file that is no hole, in bytes.
fn data_end(store: &dyn Store) -> Result<u64> {
    let (mut low, mut high) = (0, store.len()?);
    // Nothing lies at `high` or behind.
    while low < high {
        let middle = low + (high - low) / 2;
        match store.data(middle)? {
            Some(_) => low = middle + 1,
            None => high = middle,
        }
    }
    Ok(high)
}
