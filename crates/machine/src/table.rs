//! Rows that are cheap to copy.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{BTreeMap, btree_map};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// Rows by their ids, as in a [`BTreeMap`]. Copies share them until one of the two is changed, and as long as they do they are known to be equal: of a
/// thousand snapshots a commit that changes a layer copies and compares none.
#[derive(Debug, Clone, Eq)]
pub struct Table<K, V>(Arc<BTreeMap<K, V>>);

impl<K: PartialEq, V: PartialEq> PartialEq for Table<K, V> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(Arc::new(BTreeMap::new()))
    }
}

impl<K, V> Deref for Table<K, V> {
    type Target = BTreeMap<K, V>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<K: Clone + Ord, V: Clone> DerefMut for Table<K, V> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        Arc::make_mut(&mut self.0)
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for Table<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(rows: I) -> Self {
        Self(Arc::new(rows.into_iter().collect()))
    }
}

impl<K, V> From<BTreeMap<K, V>> for Table<K, V> {
    fn from(rows: BTreeMap<K, V>) -> Self {
        Self(Arc::new(rows))
    }
}

impl<'a, K, V> IntoIterator for &'a Table<K, V> {
    type Item = (&'a K, &'a V);
    type IntoIter = btree_map::Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<K: Serialize, V: Serialize> Serialize for Table<K, V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de, K: Deserialize<'de> + Ord, V: Deserialize<'de>> Deserialize<'de> for Table<K, V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BTreeMap::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_shared_until_one_is_changed() {
        let one: Table<u8, &str> = [(1, "one"), (2, "two")].into_iter().collect();
        let mut other = one.clone();
        assert!(std::ptr::eq(&raw const *one, &raw const *other));
        other.insert(3, "three");
        assert_eq!((one.len(), other.len()), (2, 3));
        assert_ne!(one, other);
        other.remove(&3);
        assert_eq!(one, other, "equal, though not shared any more");
    }
}
