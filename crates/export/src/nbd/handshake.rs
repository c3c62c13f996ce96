//! The handshake: what the two sides agree on before the first request. No I/O here.
//!
//! ```text
//!   server: hello ──►  client: flags ──►  { client: option ──► server: replies } ...  GO or EXPORT_NAME ──► transmission
//! ```
//!
//! [`Negotiation::option`] is a function of what came before and one option's bytes; it never fails, it answers.

use super::proto::{self, Bytes, hello, info, option, reply};

/// Longest option that is looked at, in bytes. (A context query with names of full length is far below.)
pub const MAX_OPTION: u32 = 64 << 10;

/// What is there to be had: one export.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Its name; the empty name always leads to it as well.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// See [`proto::transmission`].
    pub flags: u16,
    /// Smallest request in bytes, a power of two; offsets and lengths are multiples of it.
    pub min_block: u32,
}

/// What the client chose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Reads are answered in chunks.
    pub structured: bool,
    /// `base:allocation` may be asked for.
    pub allocation: bool,
}

/// What to do after an option's replies have been sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Wait for the next option.
    Next,
    /// Requests follow.
    Transmit,
    /// Close the connection.
    Leave,
}

/// One client's handshake.
#[derive(Debug)]
pub struct Negotiation<'a> {
    offer: &'a Offer,
    no_zeroes: bool,
    agreed: Agreed,
}

/// The server's first message.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[0..8].copy_from_slice(&proto::INIT_MAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&proto::OPTION_MAGIC.to_be_bytes());
    out[16..18].copy_from_slice(&(hello::FIXED_NEWSTYLE | hello::NO_ZEROES).to_be_bytes());
    out
}

/// An option's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// See [`proto::option`].
    pub option: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

impl OptionHeader {
    /// Reads a header; `None` if its magic is wrong.
    pub fn decode(bytes: &[u8; proto::OPTION_LEN]) -> Option<Self> {
        let mut bytes = Bytes(bytes);
        if bytes.u64()? != proto::OPTION_MAGIC {
            return None;
        }
        Some(Self { option: bytes.u32()?, len: bytes.u32()? })
    }
}

impl<'a> Negotiation<'a> {
    /// Takes the client's flags; `None` if it wants something that was not offered.
    pub fn new(offer: &'a Offer, client_flags: u32) -> Option<Self> {
        let known = u32::from(hello::FIXED_NEWSTYLE | hello::NO_ZEROES);
        if client_flags & !known != 0 {
            return None;
        }
        let no_zeroes = client_flags & u32::from(hello::NO_ZEROES) != 0;
        Some(Self { offer, no_zeroes, agreed: Agreed::default() })
    }

    /// What has been agreed on so far.
    pub fn agreed(&self) -> Agreed {
        self.agreed
    }

    /// The answer to an option that is longer than [`MAX_OPTION`] and was not read.
    pub fn too_long(option: u32, out: &mut Vec<u8>) -> Step {
        if option != option::EXPORT_NAME {
            proto::option_reply(out, option, reply::ERR_TOO_BIG, &[]);
        }
        Step::Leave
    }

    /// Answers one option: appends the replies to `out`.
    pub fn option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        match option {
            option::EXPORT_NAME => self.export_name(data, out),
            option::ABORT => {
                proto::option_reply(out, option, reply::ACK, &[]);
                Step::Leave
            }
            option::LIST => self.list(data, out),
            option::INFO | option::GO => self.info(option, data, out),
            option::STRUCTURED_REPLY => {
                self.agreed.structured |= data.is_empty();
                end(out, option, if data.is_empty() { reply::ACK } else { reply::ERR_INVALID })
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data, out),
            _ => end(out, option, reply::ERR_UNSUP),
        }
    }

    fn knows(&self, name: &str) -> bool {
        name.is_empty() || name == self.offer.name
    }

    /// The old way in: no reply is possible but the export's data, so a wrong name ends the session.
    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Step {
        if !std::str::from_utf8(data).is_ok_and(|name| self.knows(name)) {
            return Step::Leave;
        }
        out.extend_from_slice(&self.offer.size.to_be_bytes());
        out.extend_from_slice(&self.offer.flags.to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Step::Transmit
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Step {
        if !data.is_empty() {
            return end(out, option::LIST, reply::ERR_INVALID);
        }
        let mut server = (self.offer.name.len() as u32).to_be_bytes().to_vec();
        server.extend_from_slice(self.offer.name.as_bytes());
        proto::option_reply(out, option::LIST, reply::SERVER, &server);
        end(out, option::LIST, reply::ACK)
    }

    /// `INFO` and `GO` answer alike; `GO` also starts transmission. Size and block sizes are told unasked: the protocol allows
    /// it, and a client that did not ask then still keeps to the sector size.
    fn info(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        let Some((name, wanted)) = parse_info(data) else {
            return end(out, option, reply::ERR_INVALID);
        };
        if !self.knows(name) {
            return end(out, option, reply::ERR_UNKNOWN);
        }
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend_from_slice(&self.offer.size.to_be_bytes());
        export.extend_from_slice(&self.offer.flags.to_be_bytes());
        proto::option_reply(out, option, reply::INFO, &export);

        let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [self.offer.min_block, self.offer.min_block.max(4096), proto::MAX_PAYLOAD] {
            blocks.extend_from_slice(&size.to_be_bytes());
        }
        proto::option_reply(out, option, reply::INFO, &blocks);

        if wanted.contains(&info::NAME) {
            let mut own = info::NAME.to_be_bytes().to_vec();
            own.extend_from_slice(self.offer.name.as_bytes());
            proto::option_reply(out, option, reply::INFO, &own);
        }
        proto::option_reply(out, option, reply::ACK, &[]);
        if option == option::GO { Step::Transmit } else { Step::Next }
    }

    /// Lists or chooses contexts. A choice replaces the one before, also when it is refused.
    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Step {
        let choose = option == option::SET_META_CONTEXT;
        if choose {
            self.agreed.allocation = false;
        }
        let Some((name, queries)) = parse_contexts(data) else {
            return end(out, option, reply::ERR_INVALID);
        };
        if choose && !self.agreed.structured {
            return end(out, option, reply::ERR_INVALID);
        }
        if !self.knows(name) {
            return end(out, option, reply::ERR_UNKNOWN);
        }
        let all = !choose && queries.is_empty();
        let wanted = |query: &&str| *query == proto::BASE_ALLOCATION || (!choose && *query == "base:");
        if all || queries.iter().any(wanted) {
            // The id is ours to give, and named again in every answer; see `ALLOCATION_ID`.
            let mut context = if choose { ALLOCATION_ID } else { 0 }.to_be_bytes().to_vec();
            context.extend_from_slice(proto::BASE_ALLOCATION.as_bytes());
            proto::option_reply(out, option, reply::META_CONTEXT, &context);
            self.agreed.allocation |= choose;
        }
        end(out, option, reply::ACK)
    }
}

/// The number that stands for `base:allocation` in replies to `BLOCK_STATUS`.
pub const ALLOCATION_ID: u32 = 1;

fn end(out: &mut Vec<u8>, option: u32, kind: u32) -> Step {
    proto::option_reply(out, option, kind, &[]);
    Step::Next
}

/// The data of `INFO` and `GO`: a name and which pieces of information are wanted.
fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut bytes = Bytes(data);
    let name = bytes.string()?;
    let count = bytes.u16()?;
    if bytes.0.len() != usize::from(count) * 2 {
        return None;
    }
    let wanted = (0..count).map(|_| bytes.u16()).collect::<Option<_>>()?;
    Some((name, wanted))
}

/// The data of the context options: a name and queries. The data's length bounds the number of queries.
fn parse_contexts(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut bytes = Bytes(data);
    let name = bytes.string()?;
    let count = bytes.u32()? as usize;
    if count > bytes.0.len() / 4 {
        return None;
    }
    let queries = (0..count).map(|_| bytes.string()).collect::<Option<_>>()?;
    bytes.is_empty().then_some((name, queries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offer() -> Offer {
        Offer { name: "disk".into(), size: 1 << 30, flags: 0x16d, min_block: 512 }
    }

    fn string(text: &str) -> Vec<u8> {
        let mut out = (text.len() as u32).to_be_bytes().to_vec();
        out.extend_from_slice(text.as_bytes());
        out
    }

    fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
        let mut out = string(name);
        out.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
        out.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
        out
    }

    fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut out = string(name);
        out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
        out.extend(queries.iter().flat_map(|query| string(query)));
        out
    }

    /// The kinds and data of the replies in `out`, which must be whole.
    fn replies(out: &[u8], option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = Bytes(out);
        let mut all = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(bytes.u64(), Some(proto::OPTION_REPLY_MAGIC));
            assert_eq!(bytes.u32(), Some(option));
            let kind = bytes.u32().expect("a kind");
            let len = bytes.u32().expect("a length") as usize;
            all.push((kind, bytes.take(len).expect("the data").to_vec()));
        }
        all
    }

    fn ask(negotiation: &mut Negotiation, option: u32, data: &[u8]) -> (Step, Vec<(u32, Vec<u8>)>) {
        let mut out = Vec::new();
        let step = negotiation.option(option, data, &mut out);
        (step, replies(&out, option))
    }

    fn kinds(replies: &[(u32, Vec<u8>)]) -> Vec<u32> {
        replies.iter().map(|(kind, _)| *kind).collect()
    }

    #[test]
    fn go_tells_size_and_block_sizes_and_starts() {
        let offer = offer();
        let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
        for name in ["", "disk"] {
            let (step, replies) = ask(&mut negotiation, option::GO, &go(name, &[info::BLOCK_SIZE]));
            assert_eq!(step, Step::Transmit);
            assert_eq!(kinds(&replies), [reply::INFO, reply::INFO, reply::ACK]);
            assert_eq!(replies[0].1, [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 1, 0x6d]);
            assert_eq!(replies[1].1, [0, 3, 0, 0, 2, 0, 0, 0, 0x10, 0, 2, 0, 0, 0]);
        }
    }

    #[test]
    fn info_does_not_start() {
        let offer = offer();
        let mut negotiation = Negotiation::new(&offer, 1).expect("known flags");
        let (step, replies) = ask(&mut negotiation, option::INFO, &go("", &[info::NAME]));
        assert_eq!(step, Step::Next);
        assert_eq!(replies[2], (reply::INFO, b"\0\x01disk".to_vec()));
    }

    #[test]
    fn another_name_is_refused() {
        let offer = offer();
        let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
        let (step, replies) = ask(&mut negotiation, option::GO, &go("other", &[]));
        assert_eq!((step, kinds(&replies)), (Step::Next, vec![reply::ERR_UNKNOWN]));
        assert_eq!(negotiation.option(option::EXPORT_NAME, b"other", &mut Vec::new()), Step::Leave);
    }

    #[test]
    fn export_name_pads_for_those_who_want_it() {
        let offer = offer();
        for (flags, len) in [(1, 134), (3, 10)] {
            let mut out = Vec::new();
            let mut negotiation = Negotiation::new(&offer, flags).expect("known flags");
            assert_eq!(negotiation.option(option::EXPORT_NAME, b"", &mut out), Step::Transmit);
            assert_eq!(out.len(), len);
        }
    }

    #[test]
    fn unknown_client_flags_end_the_session() {
        assert!(Negotiation::new(&offer(), 4).is_none());
    }

    #[test]
    fn contexts_need_structured_replies() {
        let offer = offer();
        let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
        let query = contexts("", &["base:allocation", "qemu:dirty-bitmap:x"]);
        let (_, replies) = ask(&mut negotiation, option::SET_META_CONTEXT, &query);
        assert_eq!(kinds(&replies), [reply::ERR_INVALID]);
        assert!(!negotiation.agreed().allocation);

        ask(&mut negotiation, option::STRUCTURED_REPLY, &[]);
        let (_, replies) = ask(&mut negotiation, option::SET_META_CONTEXT, &query);
        assert_eq!(kinds(&replies), [reply::META_CONTEXT, reply::ACK]);
        assert_eq!(replies[0].1, b"\0\0\0\x01base:allocation");
        assert_eq!(negotiation.agreed(), Agreed { structured: true, allocation: true });

        ask(&mut negotiation, option::SET_META_CONTEXT, &contexts("other", &["base:allocation"]));
        assert!(!negotiation.agreed().allocation, "a refused choice leaves none");
    }

    #[test]
    fn contexts_are_listed_by_prefix_but_chosen_by_name() {
        let offer = offer();
        let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
        ask(&mut negotiation, option::STRUCTURED_REPLY, &[]);
        for (queries, found) in [(&[][..], true), (&["base:"], true), (&["base:allocation"], true), (&["x:"], false)] {
            let (_, replies) = ask(&mut negotiation, option::LIST_META_CONTEXT, &contexts("", queries));
            assert_eq!(replies.len(), if found { 2 } else { 1 }, "{queries:?}");
        }
        let (_, replies) = ask(&mut negotiation, option::SET_META_CONTEXT, &contexts("", &["base:"]));
        assert_eq!(kinds(&replies), [reply::ACK]);
    }

    #[test]
    fn what_is_not_there_is_said_to_be_unsupported() {
        let offer = offer();
        let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
        for option in [option::STARTTLS, option::EXTENDED_HEADERS, 4, 99, u32::MAX] {
            let (step, replies) = ask(&mut negotiation, option, b"whatever");
            assert_eq!((step, kinds(&replies)), (Step::Next, vec![reply::ERR_UNSUP]));
        }
    }

    proptest! {
        /// Whatever comes, the answer is whole replies that end in exactly one final reply; and only a well-formed GO or
        /// EXPORT_NAME starts transmission.
        #[test]
        fn any_option_gets_an_orderly_answer(option in 0..13u32, data in prop::collection::vec(any::<u8>(), 0..80)) {
            let offer = offer();
            let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
            negotiation.option(option::STRUCTURED_REPLY, &[], &mut Vec::new());
            let mut out = Vec::new();
            let step = negotiation.option(option, &data, &mut out);
            if option != option::EXPORT_NAME {
                let kinds = kinds(&replies(&out, option));
                let (last, before) = kinds.split_last().expect("an answer");
                prop_assert!(*last == reply::ACK || last >> 31 == 1);
                prop_assert!(before.iter().all(|k| *k != reply::ACK && k >> 31 == 0));
                prop_assert!(step != Step::Transmit || (option == option::GO && *last == reply::ACK));
            }
        }

        /// Nearly right data: lengths and counts that lie.
        #[test]
        fn lengths_that_lie_are_refused(at in 0..40usize, value in any::<u8>(), cut in 0..40usize) {
            let offer = offer();
            let mut negotiation = Negotiation::new(&offer, 3).expect("known flags");
            for option in [option::GO, option::SET_META_CONTEXT, option::LIST_META_CONTEXT] {
                let mut data = if option == option::GO { go("disk", &[0, 1, 3]) } else { contexts("disk", &["base:allocation"]) };
                if let Some(byte) = data.get_mut(at) {
                    *byte = value;
                }
                data.truncate(data.len().max(cut) - cut.min(data.len()));
                let mut out = Vec::new();
                negotiation.option(option, &data, &mut out);
                replies(&out, option);
            }
        }
    }
}
