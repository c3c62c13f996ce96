//! Telling a child where its parent is, after a file was renamed or moved; and, if somebody insists, which one it is.

use crate::layer::{Layer, ParentLink};
use crate::siblings::accepts;
use crate::{Error, ErrorKind, Result};
use uuid::Uuid;

/// A child and a file that may be its parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Match {
    /// The id that the child names.
    pub named: Uuid,
    /// The other one that it accepts, while a merge is under way.
    pub named2: Option<Uuid>,
    /// The id that the file has.
    pub found: Uuid,
    /// The disk's identity as a guest sees it is the same: they are of one family, which proves no more than that.
    pub same_disk: bool,
    /// The child accepts the parent.
    pub fits: bool,
}

/// Compares what a child says of its parent with what a file is.
///
/// # Errors
/// [`ErrorKind::Parent`] if the file cannot be the child's parent at all, whatever the ids: the child is none, the sectors differ, or the
/// file has no id.
pub fn examine(child: &dyn Layer, parent: &dyn Layer) -> Result<Match> {
    let (info, other) = (child.info(), parent.info());
    let refuse = |message: String| Err(Error::new(ErrorKind::Parent, child.store().name(), message));
    let Some(link) = info.parent else { return refuse("it is no differencing image, and has no parent".to_owned()) };
    if info.sector_size != other.sector_size {
        let (own, theirs) = (info.sector_size, other.sector_size);
        return refuse(format!("it has sectors of {own} bytes, and {} of {theirs}", parent.store().name()));
    }
    if other.data_id.is_nil() {
        return refuse(format!("{} has no id by which a child could know it", parent.store().name()));
    }
    Ok(Match {
        named: link.linkage,
        named2: link.linkage2,
        found: other.data_id,
        same_disk: info.disk_id == other.disk_id,
        fits: accepts(&link, other.data_id),
    })
}

/// Writes into the child that its parent is the file `name` beside it. If the ids do not fit it is refused, unless `force`: then the
/// child takes over the parent's id and remembers that it was forced.
///
/// # Errors
/// As [`examine`], and [`ErrorKind::Parent`] if the ids do not fit.
pub fn reconnect(child: &dyn Layer, parent: &dyn Layer, name: &str, force: bool) -> Result<Match> {
    let found = examine(child, parent)?;
    let link = child.info().parent.expect("it was examined");
    let link = ParentLink { relative_path: Some(format!(r".\{name}")), absolute_path: None, ..link };
    if found.fits {
        child.relink(None, Some(link))?;
    } else if force {
        child.force_parent(ParentLink { linkage: found.found, linkage2: None, ..link })?;
    } else {
        let message = format!("it was made over {}, and {name} is {}", found.named, found.found);
        return Err(Error::new(ErrorKind::Parent, child.store().name(), message));
    }
    child.close()?;
    Ok(found)
}
