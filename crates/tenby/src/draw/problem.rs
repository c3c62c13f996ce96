//! Problems: `error:` what happened, `hint:` what to type.

use super::{Look, plain};
use anstyle::{AnsiColor, Style};
use machine::request::Problem;

/// The lines for standard error.
pub(crate) fn problem(problem: &Problem, look: &Look) -> String {
    let mut lines =
        vec![format!("{} {}", look.paint("error:", AnsiColor::Red.on_default().bold()), plain(&problem.message))];
    // A message that names the candidates itself needs no list of them.
    if !problem.candidates.iter().any(|candidate| named_by(&problem.message, candidate).is_some()) {
        lines.extend(problem.candidates.iter().map(|candidate| format!("       {}", plain(candidate))));
    }
    lines.extend(
        problem.hint.as_ref().map(|hint| format!("{} {}", look.paint("hint:", Style::new().bold()), plain(hint))),
    );
    lines.join("\n") + "\n"
}

/// The word of a message that names a candidate: all of its id, or how it begins.
pub(crate) fn named_by<'a>(message: &'a str, candidate: &str) -> Option<&'a str> {
    let mut words = message.split(|c: char| !c.is_ascii_alphanumeric());
    words.find(|word| word.len() >= SHORTEST_ID && candidate.starts_with(word))
}

/// Ids are shortened to this many digits at least.
const SHORTEST_ID: usize = 4;

#[cfg(test)]
mod tests {
    use super::super::tests::look;
    use super::*;
    use machine::request::ProblemKind;

    #[test]
    fn what_happened_and_what_to_type() {
        let lost = Problem::refused(
            "Tenby has changed since Thursday (12M on 1 disk, and its memory); applying Tuesday would lose that",
        )
        .hint("tenby snapshot apply Tenby Tuesday --keep      (or --discard)");
        insta::assert_snapshot!(problem(&lost, &look()), @r"
        error: Tenby has changed since Thursday (12M on 1 disk, and its memory); applying Tuesday would lose that
        hint: tenby snapshot apply Tenby Tuesday --keep      (or --discard)
        ");
    }

    #[test]
    fn candidates_that_the_message_names_are_not_repeated() {
        let candidates = vec!["3f9c0123456789ab".to_owned(), "a17e0123456789ab".to_owned()];
        let mut named = Problem::new(
            ProblemKind::Ambiguous,
            r#"two snapshots of Tenby are named "back": 3f9c (Mon 23 Nov 10:02), a17e (Tue 24 Nov 18:30)"#,
        )
        .hint("tenby snapshot delete Tenby 3f9c");
        named.candidates.clone_from(&candidates);
        insta::assert_snapshot!(problem(&named, &look()), @r#"
        error: two snapshots of Tenby are named "back": 3f9c (Mon 23 Nov 10:02), a17e (Tue 24 Nov 18:30)
        hint: tenby snapshot delete Tenby 3f9c
        "#);
        let mut unnamed = Problem::new(ProblemKind::Ambiguous, r#""a" begins the ids of several machines"#);
        unnamed.candidates = candidates;
        insta::assert_snapshot!(problem(&unnamed, &look()), @r#"
        error: "a" begins the ids of several machines
               3f9c0123456789ab
               a17e0123456789ab
        "#);
    }

    #[test]
    fn nothing_that_steers_a_terminal_gets_out() {
        let hostile = Problem::failed("a \u{1b}]0;name\u{7} of theirs\nerror: all is well");
        assert_eq!(problem(&hostile, &look()), "error: a  ]0;name  of theirs error: all is well\n");
    }
}
