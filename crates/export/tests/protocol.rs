//! The server against a client of ours that can misbehave.

mod support;

use export::nbd::proto::{self, Command, flag, option, reply};
use export::{Export, Options, listen_unix};
use image::{Access, Chain};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use support::client::{Client, Reply, greet, option_replies, send_option};
use support::{Served, cool, disk, leaf_over, options};

const MIB: u64 = 1 << 20;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        })
        .collect()
}

#[test]
fn what_is_written_is_read() {
    let served = Served::new(8 * MIB);
    for mut client in [Client::new(&served.socket), Client::simple(&served.socket)] {
        assert_eq!(client.size, 8 * MIB);
        for (offset, len) in [(0, 512), (4096, 65536), (MIB + 1, 3), (2 * MIB, 5 << 20), (8 * MIB - 1, 1)] {
            let data = pattern(offset + len as u64, len);
            assert_eq!(client.write(offset, &data), 0);
            assert!(client.read(offset, len as u32).data == data, "{len} at {offset}");
        }
        assert_eq!(client.ask(Command::Flush, 0, 0, 0, &[]).error, 0);
        assert_eq!(client.ask(Command::WriteZeroes, flag::NO_HOLE | flag::FAST_ZERO, 0, 4096, &[]).error, 0);
        assert_eq!(client.read(0, 4096).data, [0; 4096]);
        assert_eq!(client.ask(Command::Trim, flag::FUA, 0, (8 * MIB) as u32, &[]).error, 0);
        let all = client.read(0, (8 * MIB) as u32);
        assert!(all.data == vec![0; 8 << 20]);
        client.send(Command::Disconnect, 0, 0, 0, &[]);
        assert!(client.is_closed());
    }
}

#[test]
fn what_is_empty_is_not_sent_as_zeros() {
    let served = Served::new(32 * MIB);
    let mut client = Client::new(&served.socket);
    client.write(16 * MIB, &pattern(1, 512));
    let reply = client.read(0, 32 << 20);
    assert_eq!(reply.data[16 << 20..(16 << 20) + 512], pattern(1, 512));
    assert!(reply.holes > 31 << 20);
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_next_one_is_served() {
    let served = Served::new(4 * MIB);
    let mut client = Client::new(&served.socket);
    let big = vec![7; (32 << 20) + 1];
    let refused = [
        (Command::Read, 0, 4 * MIB, 1, [].as_slice(), EINVAL),
        (Command::Read, 0, u64::MAX, 512, &[], EINVAL),
        (Command::Read, 0, 0, (32 << 20) + 1, &[], EINVAL),
        (Command::Write, 0, 4 * MIB - 1, 2, &[1, 2], ENOSPC),
        (Command::Write, 0, u64::MAX - 1, 512, &[9; 512], ENOSPC),
        (Command::Write, 0, 0, big.len() as u32, &big, EINVAL),
        (Command::Write, 1 << 15, 0, 4, &[1, 2, 3, 4], EINVAL),
        (Command::WriteZeroes, 0, 0, u32::MAX, &[], ENOSPC),
        (Command::Trim, flag::NO_HOLE, 0, 512, &[], EINVAL),
        (Command::BlockStatus, 0, 0, 0, &[], EINVAL),
        (Command::BlockStatus, 0, 4 * MIB, 512, &[], EINVAL),
        (Command::Other(99), 0, 0, 0, &[], EINVAL),
    ];
    for (command, flags, offset, len, payload, error) in refused {
        let reply = client.ask(command, flags, offset, len, payload);
        assert_eq!(reply.error, error, "{command:?} {flags:x} {offset} {len}");
    }
    assert_eq!(client.read(0, 0), Reply { cookie: 13, ..Reply::default() });
    assert_eq!(client.write(0, &[]), 0);
    assert_eq!(served.content(), vec![0; 4 << 20], "nothing was written");
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let served = Served::with(disk(MIB), Options { read_only: true, ..options() });
    let mut client = Client::new(&served.socket);
    assert_eq!(client.flags & 2, 2);
    assert_eq!(client.write(0, &[1; 512]), EPERM);
    for command in [Command::Trim, Command::WriteZeroes] {
        assert_eq!(client.ask(command, 0, 0, 512, &[]).error, EPERM);
    }
    assert_eq!(client.ask(Command::Flush, 0, 0, 0, &[]).error, 0);
    assert_eq!(client.read(0, 512).data, [0; 512]);
}

#[test]
fn block_status_tells_data_from_zeros() {
    let served = Served::new(16 * MIB);
    let mut client = Client::new(&served.socket);
    client.write(4 * MIB, &pattern(3, 1 << 20));
    let reply = client.ask(Command::BlockStatus, 0, 0, (16 * MIB) as u32, &[]);
    assert_eq!(reply.extents, [(4 << 20, 3), (1 << 20, 0), (11 << 20, 3)]);
    let reply = client.ask(Command::BlockStatus, flag::REQ_ONE, MIB, (8 * MIB) as u32, &[]);
    assert_eq!(reply.extents, [(3 << 20, 3)]);
    let reply = client.ask(Command::BlockStatus, 0, 4 * MIB + 512, 1024, &[]);
    assert_eq!(reply.extents, [(1024, 0)]);

    let mut simple = Client::simple(&served.socket);
    assert_eq!(simple.ask(Command::BlockStatus, 0, 0, 512, &[]).error, EINVAL, "it was not agreed on");
}

#[test]
fn block_status_is_bounded() {
    let served = Served::new(8 * MIB);
    let mut client = Client::new(&served.socket);
    for sector in (0..8 * MIB / 512).step_by(2) {
        served.chain.write(&[1; 512], sector * 512).expect("written");
    }
    let reply = client.ask(Command::BlockStatus, 0, 0, (8 * MIB) as u32, &[]);
    assert_eq!((reply.extents.len(), reply.extents[0], reply.extents[1]), (1024, (512, 0), (512, 3)));
}

#[test]
fn the_wrong_magic_ends_the_connection_and_no_other() {
    let served = Served::new(MIB);
    let mut bystander = Client::new(&served.socket);
    let mut client = Client::new(&served.socket);
    client.stream.write_all(&[0x55; 28]).expect("sent");
    assert!(client.is_closed());
    assert_eq!(bystander.read(0, 512).error, 0);
}

#[test]
fn clients_that_leave_in_the_middle_do_no_harm() {
    let served = Served::new(MIB);
    for bytes in [&[][..], &[0x25, 0x60][..]] {
        let mut client = Client::new(&served.socket);
        client.stream.write_all(bytes).expect("sent");
        drop(client);
    }
    let mut half = Client::new(&served.socket);
    half.send(Command::Write, 0, 0, 4096, &[1; 100]);
    drop(half);
    let mut gone = Client::new(&served.socket);
    gone.send(Command::Read, 0, 0, MIB as u32, &[]);
    drop(gone);
    assert_eq!(Client::new(&served.socket).read(0, 512).data, [0; 512]);
    assert_eq!(served.content(), vec![0; 1 << 20], "half a write is none");
}

#[test]
fn the_handshake_lists_and_refuses() {
    let served = Served::with(disk(MIB), Options { name: "disk".into(), ..options() });
    let mut stream = greet(&served.socket);
    send_option(&mut stream, option::LIST, &[]);
    assert_eq!(
        option_replies(&mut stream, option::LIST),
        [(reply::SERVER, b"\0\0\0\x04disk".to_vec()), (reply::ACK, vec![])]
    );
    send_option(&mut stream, option::STARTTLS, &[]);
    assert_eq!(option_replies(&mut stream, option::STARTTLS)[0].0, reply::ERR_UNSUP);
    send_option(&mut stream, option::GO, b"\0\0\0\x05other\0\0");
    assert_eq!(option_replies(&mut stream, option::GO)[0].0, reply::ERR_UNKNOWN);
    send_option(&mut stream, option::ABORT, &[]);
    assert_eq!(option_replies(&mut stream, option::ABORT)[0].0, reply::ACK);
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);

    let mut stream = greet(&served.socket);
    let mut long = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    long.extend_from_slice(&[0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]);
    stream.write_all(&long).expect("sent");
    assert_eq!(option_replies(&mut stream, option::GO)[0].0, reply::ERR_TOO_BIG);
}

#[test]
fn requests_may_follow_the_handshake_without_waiting() {
    let served = Served::new(MIB);
    let mut stream = greet(&served.socket);
    let mut message = proto::OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0]);
    let read = proto::Request { flags: 0, command: Command::Read, cookie: 5, offset: 0, len: 512 };
    message.extend_from_slice(&read.encode());
    stream.write_all(&message).expect("sent");
    let mut reply = [0; 10 + 16 + 512];
    stream.read_exact(&mut reply).expect("size, flags and the reply");
    assert_eq!(reply[10..14], proto::SIMPLE_REPLY_MAGIC.to_be_bytes());
}

#[test]
fn the_first_change_waits_for_the_gate_and_reads_do_not() {
    let (asked, tell) = (Arc::new(AtomicUsize::new(0)), mpsc::channel::<bool>());
    let (counter, answers) = (Arc::clone(&asked), tell.1);
    let before_first_change = Box::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
        if answers.recv().expect("an answer") { Ok(()) } else { Err(std::io::ErrorKind::Other.into()) }
    });
    let options = Options { before_first_change: Some(before_first_change), ..options() };
    let served = Served::with(disk(MIB), options);
    let mut writer = Client::new(&served.socket);
    let mut reader = Client::new(&served.socket);

    writer.send(Command::Write, 0, 0, 512, &[1; 512]);
    assert_eq!(reader.read(0, 512).data, [0; 512], "the write waits, the read does not");
    tell.0.send(false).expect("the hook waits");
    assert_eq!(writer.receive().expect("an answer").error, EIO);
    assert_eq!(reader.read(0, 512).data, [0; 512]);

    tell.0.send(true).expect("the hook will ask");
    assert_eq!(writer.write(0, &[2; 512]), 0);
    assert_eq!(writer.ask(Command::Trim, 0, 512, 512, &[]).error, 0);
    assert_eq!(asked.load(Ordering::SeqCst), 2, "once it said no, once yes");
    assert_eq!(reader.read(0, 512).data, [2; 512]);
}

#[test]
fn too_many_clients_are_turned_away() {
    let served = Served::with(disk(MIB), Options { connections: 2, ..options() });
    let _first = Client::new(&served.socket);
    let mut second = Client::new(&served.socket);
    assert_eq!(served.export.connections(), 2);
    let mut third = UnixStream::connect(&served.socket).expect("the socket listens");
    assert_eq!(third.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(second.read(0, 512).error, 0);
}

#[test]
fn dropped_connections_may_come_back_and_stopped_ones_not() {
    let served = Served::new(MIB);
    let mut client = Client::new(&served.socket);
    assert_eq!(client.write(0, &[1; 512]), 0);
    served.export.drop_connections();
    assert!(client.is_closed());
    assert_eq!(served.export.connections(), 0);

    let mut client = Client::new(&served.socket);
    assert_eq!(client.read(0, 512).data, [1; 512]);
    served.export.stop();
    assert!(client.is_closed());
    served.export.stop();
    assert!(served.export.idle());
    assert!(UnixStream::connect(&served.socket).is_err(), "nobody listens");
}

#[test]
fn what_is_under_way_is_answered_before_the_end() {
    let (reached, go_on) = (mpsc::channel(), mpsc::channel::<()>());
    let (tell, wait) = (reached.0, go_on.1);
    let hook = Box::new(move || {
        tell.send(()).expect("the test waits");
        wait.recv().map_err(std::io::Error::other)
    });
    let served = Served::with(disk(MIB), Options { before_first_change: Some(hook), ..options() });
    let mut client = Client::new(&served.socket);
    client.send(Command::Write, flag::FUA, 0, 512, &[3; 512]);
    reached.1.recv().expect("the write is under way");
    assert!(!served.export.idle());
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            served.export.stop();
            stopped.store(true, Ordering::SeqCst);
        });
        assert!(!stopped.load(Ordering::SeqCst), "it waits for the write");
        go_on.0.send(()).expect("the write waits");
        assert_eq!(client.receive().expect("an answer").error, 0);
        assert_eq!(client.receive(), None);
    });
    assert_eq!(served.content()[..512], [3; 512]);
}

#[test]
fn a_new_server_takes_over_a_dead_ones_socket() {
    let first = Served::new(MIB);
    let mut client = Client::new(&first.socket);
    client.write(0, &[9; 512]);
    first.export.stop();
    let listener = listen_unix(&first.socket).expect("the name is stale");
    let _second = Export::serve(Arc::clone(&first.chain), listener, options()).expect("threads");
    assert_eq!(Client::new(&first.socket).read(0, 512).data, [9; 512]);
}

#[test]
fn tcp_works_too() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    let chain: Arc<Chain> = disk(MIB);
    let export = Export::serve(chain, listener, options()).expect("threads");
    let mut stream = std::net::TcpStream::connect(address).expect("it listens");
    let mut hello = [0; 18];
    stream.read_exact(&mut hello).expect("a greeting");
    stream.shutdown(Shutdown::Write).expect("connected");
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
    export.stop();
}

#[test]
fn a_chain_that_may_only_be_read_says_so_to_writers() {
    let chain = Arc::new(Chain::new(disk(MIB).layers(), Access::Read).expect("two layers"));
    let served = Served::with(chain, options());
    let mut client = Client::new(&served.socket);
    assert_ne!(client.write(0, &[1; 512]), 0);
    assert_eq!(client.read(0, 512).error, 0);
}

/// One client's part in a crowd: writes its own sectors over and over, deep in the pipeline, and reads them back.
fn crowd_member(served: &Served, member: u64, rounds: u64) {
    let mut client = Client::new(&served.socket);
    let place = |slot: u64| (slot * 4 + member) * 4096;
    for round in 0..rounds {
        for slot in 0..32 {
            let data = pattern(round * 1000 + slot * 10 + member, 4096);
            client.send(Command::Write, if slot == 7 { flag::FUA } else { 0 }, place(slot), 4096, &data);
        }
        (0..32).for_each(|_| assert_eq!(client.receive().expect("an answer").error, 0));
        let asked: Vec<u64> = (0..32).map(|slot| client.send(Command::Read, 0, place(slot), 4096, &[])).collect();
        for _ in 0..32 {
            let reply = client.receive().expect("an answer");
            let slot = asked.iter().position(|cookie| *cookie == reply.cookie).expect("one of ours") as u64;
            assert!(reply.data == pattern(round * 1000 + slot * 10 + member, 4096), "slot {slot}");
        }
    }
}

#[test]
fn several_connections_deep_in_the_pipeline() {
    let served = Served::new(MIB);
    std::thread::scope(|scope| {
        for member in 0..4 {
            let served = &served;
            scope.spawn(move || crowd_member(served, member, 20));
        }
    });
}

/// A client that waits for all of these.
fn receive_all(client: &mut Client, mut asked: Vec<u64>) -> Vec<Reply> {
    let mut replies = Vec::new();
    while !asked.is_empty() {
        let reply = client.receive().expect("an answer");
        let index = asked.iter().position(|cookie| *cookie == reply.cookie).expect("one of ours, once");
        asked.swap_remove(index);
        replies.push(reply);
    }
    replies
}

#[test]
fn reads_that_wait_for_the_disk_and_all_that_may_wait_for_them() {
    let served = Served::new(8 * MIB);
    let mut client = Client::new(&served.socket);
    let data = pattern(5, 4 << 20);
    assert_eq!(client.write(0, &data), 0);
    for round in 0..8 {
        cool(&served.chain);
        let leaf = leaf_over(&served.chain);
        std::thread::scope(|scope| {
            // Waits until no request is under way, and holds up those that come then.
            scope.spawn(|| served.chain.push(leaf).expect("a leaf"));
            let mut reads = Vec::new();
            let mut changes = Vec::new();
            for step in 0..64u64 {
                let offset = (step * 7919 + round * 31) % 1000 * 4096;
                reads.push((client.send(Command::Read, 0, offset, 4096, &[]), offset));
                // The same stripes, alone: a part of a sector, and a place given back.
                let beside = (4 << 20) + step * 4096;
                changes.push(client.send(Command::Write, 0, beside + 1, 3, &[1, 2, 3]));
                changes.push(client.send(Command::Trim, 0, beside, 4096, &[]));
                changes.push(client.send(Command::Flush, 0, 0, 0, &[]));
            }
            let asked = reads.iter().map(|(cookie, _)| *cookie).chain(changes).collect();
            for reply in receive_all(&mut client, asked) {
                assert_eq!(reply.error, 0);
                if let Some((_, offset)) = reads.iter().find(|(cookie, _)| *cookie == reply.cookie) {
                    assert!(reply.data == data[*offset as usize..][..4096], "{offset}");
                }
            }
        });
    }
}

#[test]
fn a_client_that_takes_no_replies_holds_nobody_up() {
    let served = Served::new(8 * MIB);
    let mut client = Client::new(&served.socket);
    let data = pattern(6, 8 << 20);
    assert_eq!(client.write(0, &data), 0);
    cool(&served.chain);
    // Far more than a socket holds.
    let asked: Vec<u64> = (0..128).map(|n| client.send(Command::Read, 0, n << 16, 1 << 16, &[])).collect();
    served.chain.push(leaf_over(&served.chain)).expect("a leaf");
    served.chain.zero(0, 8 * MIB).expect("alone");
    let mut other = Client::new(&served.socket);
    assert_eq!(other.read(0, 4096).data, [0; 4096]);
    let replies = receive_all(&mut client, asked);
    assert!(replies.iter().all(|reply| reply.error == 0 && reply.data.len() == 1 << 16));
}

#[test]
fn a_file_that_was_cut_is_an_error_and_the_next_request_is_served() {
    let served = Served::new(8 * MIB);
    let mut client = Client::new(&served.socket);
    assert_eq!(client.write(0, &pattern(7, 64 << 10)), 0);
    served.chain.flush().expect("durable");
    served.chain.layers()[1].store().set_len(MIB).expect("cut");
    for _ in 0..3 {
        let asked = (0..16).map(|n| client.send(Command::Read, 0, n * 4096, 4096, &[])).collect();
        assert!(receive_all(&mut client, asked).iter().all(|reply| reply.error == EIO));
        assert_eq!(client.read(4 * MIB, 4096).data, [0; 4096]);
    }
}

#[derive(Debug, Clone)]
enum Action {
    Write { offset: u64, len: u32, fua: bool },
    Zero { offset: u64, len: u32 },
    Trim { offset: u64, len: u32 },
    Read { offset: u64, len: u32 },
}

fn action(size: u64) -> impl Strategy<Value = Action> {
    let range = (0..size, prop_oneof![1..2000u32, 1..200_000u32, Just(512), Just(4096)])
        .prop_map(move |(offset, len)| (offset, len.min((size - offset) as u32)));
    (range, 0..5u8).prop_map(|((offset, len), what)| match what {
        0 => Action::Write { offset, len, fua: false },
        1 => Action::Write { offset, len, fua: true },
        2 => Action::Zero { offset, len },
        3 => Action::Trim { offset: offset & !511, len: len & !511 },
        _ => Action::Read { offset, len },
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Through the protocol the disk is a plain array of bytes.
    #[test]
    fn the_disk_is_an_array_of_bytes(structured: bool, actions in prop::collection::vec(action(MIB), 1..60)) {
        let served = Served::new(MIB);
        let mut client = if structured { Client::new(&served.socket) } else { Client::simple(&served.socket) };
        let mut model = vec![0u8; MIB as usize];
        for (step, action) in actions.into_iter().enumerate() {
            match action {
                Action::Write { offset, len, fua } => {
                    let data = pattern(step as u64, len as usize);
                    let flags = if fua { flag::FUA } else { 0 };
                    prop_assert_eq!(client.ask(Command::Write, flags, offset, len, &data).error, 0);
                    model[offset as usize..][..len as usize].copy_from_slice(&data);
                }
                Action::Zero { offset, len } => {
                    prop_assert_eq!(client.ask(Command::WriteZeroes, 0, offset, len, &[]).error, 0);
                    model[offset as usize..][..len as usize].fill(0);
                }
                Action::Trim { offset, len } => {
                    prop_assert_eq!(client.ask(Command::Trim, 0, offset, len, &[]).error, 0);
                    model[offset as usize..][..len as usize].fill(0);
                }
                Action::Read { offset, len } => {
                    prop_assert!(client.read(offset, len).data == model[offset as usize..][..len as usize]);
                }
            }
        }
        prop_assert!(served.content() == model);
    }

    /// Noise, at any point of the conversation, ends at most the connection it comes by.
    #[test]
    fn noise_ends_one_connection_at_most(
        phase in 0..3u8,
        mut noise in prop::collection::vec(any::<u8>(), 0..300),
        plausible: bool,
    ) {
        let served = Served::new(MIB);
        let mut stream = match phase {
            0 => UnixStream::connect(&served.socket).expect("it listens"),
            1 => greet(&served.socket),
            _ => Client::new(&served.socket).stream,
        };
        if plausible {
            let magic = if phase == 1 { proto::OPTION_MAGIC.to_be_bytes().to_vec() } else { proto::REQUEST_MAGIC.to_be_bytes().to_vec() };
            noise.splice(0..0, magic);
        }
        // The server may be gone before all of it is sent.
        let _sent = stream.write_all(&noise);
        let _shut = stream.shutdown(Shutdown::Write);
        let _heard = stream.read_to_end(&mut Vec::new());
        prop_assert_eq!(Client::new(&served.socket).read(0, 512).error, 0);
    }
}
