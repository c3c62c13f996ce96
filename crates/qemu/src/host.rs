//! What this host has to give: RAM, and what its processors can do.

use std::collections::BTreeSet;

/// The variable that says how much RAM the host can give away, bytes: for tests.
const RAM: &str = "TENBY_AVAILABLE_RAM";

/// RAM that the host could give away without running short, bytes, if it says.
pub fn available_ram() -> Option<u64> {
    let said = std::env::var(RAM).ok().and_then(|bytes| bytes.parse().ok());
    said.or_else(|| parse_available(&std::fs::read_to_string("/proc/meminfo").ok()?))
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok()?.checked_mul(1 << 10)
}

/// What this host's processors can do, in the kernel's words (`avx2`, `sha_ni`, …).
pub fn processor_features() -> BTreeSet<String> {
    parse_features(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn parse_features(cpuinfo: &str) -> BTreeSet<String> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    flags.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says() {
        assert_eq!(parse_available("MemTotal:  100 kB\nMemAvailable:   7 kB\nMemFree: 1 kB\n"), Some(7 << 10));
        assert_eq!(parse_available("MemTotal:  100 kB\n"), None);
        let cpuinfo = "processor\t: 0\nflags\t\t: fpu avx2\nvmx flags\t: vnmi\n\nprocessor\t: 1\nflags\t\t: fpu\n";
        assert_eq!(parse_features(cpuinfo).into_iter().collect::<Vec<_>>(), ["avx2", "fpu"]);
        assert_eq!(parse_features("").len(), 0);
    }
}
