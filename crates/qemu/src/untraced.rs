//! The privilege to track memory, without what else it opens.
//!
//! QEMU before 8.0 does not know `/dev/userfaultfd`: it needs `CAP_SYS_PTRACE`, which lets a process read and write every other. It does so by
//! system calls, which are refused from here on, in this program and in whatever it becomes; or by files in `/proc` (`mem`, `environ`, `fd`), which
//! only their owner opens, privilege or not. What is left is to see where in their memory other processes have what (`maps`), and to begin a path
//! where one of them stands (`cwd`), with no more rights from there on than its user has.

#![expect(unsafe_code, reason = "a filter of system calls, for which there is no safe binding")]

use std::io;

/// The ways into another process. The system calls that do the same for another kind of program are refused with all else of theirs.
const REFUSED: [libc::c_long; 9] = [
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_perf_event_open,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
];

/// The kind of program that this is (`AUDIT_ARCH_…`): each kind has numbers of its own for the system calls.
const KIND: u32 = if cfg!(target_arch = "x86_64") { 0xC000_003E } else { 0xC000_00B7 };

/// Numbers from here on are those of x32, a third kind that goes by the name of the first.
const X32: u32 = 0x4000_0000;

/// Where the filter finds what it looks at (`struct seccomp_data`).
const NUMBER_AT: u32 = 0;
const KIND_AT: u32 = 4;

/// Refuses them. Takes `no_new_privs`, and cannot be undone.
pub(crate) fn forbid() -> io::Result<()> {
    let mut filter = filter();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the kernel copies the filter, of the given length, during the call, through which it lives.
    let done = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::c_ulong::from(libc::SECCOMP_MODE_FILTER), &raw const program)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Each test that holds jumps to the last instruction, which refuses; whatever passes all of them comes to the one before it.
fn filter() -> Vec<libc::sock_filter> {
    let load = |at| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let end = |verdict| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, verdict);
    let tests = REFUSED.len() as u8;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let from = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let mut filter = vec![
        load(KIND_AT),
        instruction(equal, 0, tests + 3, KIND),
        load(NUMBER_AT),
        instruction(from, tests + 1, 0, X32),
    ];
    filter.extend((0..tests).zip(REFUSED).map(|(at, call)| instruction(equal, tests - at, 0, call as u32)));
    filter.extend([end(libc::SECCOMP_RET_ALLOW), end(libc::SECCOMP_RET_ERRNO | libc::EPERM as u32)]);
    filter
}

fn instruction(code: u32, if_so: u8, if_not: u8, operand: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: if_so, jf: if_not, k: operand }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would say: the filter carried out by hand.
    fn verdict(kind: u32, number: u32) -> u32 {
        let filter = filter();
        let (mut at, mut value) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = filter[at];
            at += 1;
            let holds = match u32::from(code) {
                0x20 => {
                    value = if k == NUMBER_AT { number } else { kind };
                    continue;
                }
                0x15 => value == k,
                0x35 => value >= k,
                0x06 => return k,
                other => panic!("{other:#x}"),
            };
            at += usize::from(if holds { jt } else { jf });
        }
    }

    #[test]
    fn exactly_the_ways_into_another_process_are_refused() {
        let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        for number in 0..1024 {
            let is_one = REFUSED.contains(&libc::c_long::from(number));
            let expected = if is_one { refused } else { libc::SECCOMP_RET_ALLOW };
            assert_eq!(verdict(KIND, number as u32), expected, "{number}");
            assert_eq!(verdict(KIND, X32 + number as u32), refused, "{number} of x32");
            assert_eq!(verdict(0x4000_0003, number as u32), refused, "{number} of i386");
        }
    }
}
