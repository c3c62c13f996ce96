//! How much memory an execution holds.

use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Begins to measure: what is held now, in bytes.
pub(crate) fn begin() -> u64 {
    ALLOCATOR.reset_peak_usage();
    ALLOCATOR.current_usage() as u64
}

/// The most that was held since, beyond what was held then.
pub(crate) fn peak_since(before: u64) -> u64 {
    (ALLOCATOR.peak_usage() as u64).saturating_sub(before)
}
