//! The end of the stream: the devices' state, an EOF mark, and a description of that state in JSON.

use super::format::{DESCRIPTION, EOF};
use crate::{Error, ErrorKind, Result};

/// The devices' state with the description that QEMU wrote of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// The devices' sections, opaque.
    pub state: Vec<u8>,
    /// Names, versions and sizes of the devices' fields, JSON. QEMU expects it when loading, though it does not use it.
    pub description: Vec<u8>,
}

impl DeviceState {
    /// Splits what followed RAM in a stream that has ended.
    ///
    /// The description's length is the only one there is: the split is where an EOF mark and a description of exactly the
    /// remaining length begin. A stream cut short has no such place ([`ErrorKind::Truncated`]): this is how a capture knows
    /// that it saw the end.
    pub fn split(mut bytes: Vec<u8>) -> Result<Self> {
        let at = Self::tail(&bytes)
            .ok_or_else(|| Error::new(ErrorKind::Truncated, "the stream ended early, within the devices' state"))?;
        let description = bytes.split_off(at + 6);
        bytes.truncate(at);
        Ok(Self { state: bytes, description })
    }

    /// The bytes that [`split`](Self::split) takes apart.
    pub fn join(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.state);
        out.extend_from_slice(&[EOF, DESCRIPTION]);
        out.extend_from_slice(&(self.description.len() as u32).to_be_bytes());
        out.extend_from_slice(&self.description);
    }

    /// Where the EOF mark before the description is: the last place that fits. (JSON holds no zero byte, so nothing inside the
    /// description can look like one.)
    fn tail(bytes: &[u8]) -> Option<usize> {
        (0..bytes.len().checked_sub(6)?).rev().find(|&at| {
            let rest = &bytes[at..];
            rest[..2] == [EOF, DESCRIPTION]
                && rest[2..6] == ((rest.len() - 6) as u32).to_be_bytes()
                && rest.get(6) == Some(&b'{')
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_at_the_last_place_that_fits() {
        // A state that itself ends in what looks like an EOF and a description of another length.
        let whole =
            DeviceState { state: b"\x04abc\x00\x06\x00\x00\x00\x01{".to_vec(), description: b"{\"a\":1}".to_vec() };
        let mut bytes = Vec::new();
        whole.join(&mut bytes);
        assert_eq!(DeviceState::split(bytes).unwrap(), whole);
    }

    #[test]
    fn a_cut_is_noticed_at_every_byte() {
        let whole = DeviceState { state: vec![4, 0, 6, 0, 0, 0, 3], description: br#"{"devices":[]}"#.to_vec() };
        let mut bytes = Vec::new();
        whole.join(&mut bytes);
        for end in 0..bytes.len() {
            let mut cut = bytes.clone();
            cut.truncate(end);
            let error = DeviceState::split(cut).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Truncated, "cut at {end}");
        }
    }
}
