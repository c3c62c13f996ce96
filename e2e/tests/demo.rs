//! The week that a newcomer sees first.

use e2e::Lab;

/// Of each day the guest vouches for what it finds.
#[test]
fn the_week_is_played_and_proven() {
    let lab = Lab::empty();
    let story = lab.ok(&["demo", "week"]);
    for day in ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"] {
        assert!(story.contains(&format!("{day:11}RAM and disks proven")), "{day}: {story}");
    }
}
