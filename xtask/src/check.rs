//! The direction of dependencies between the crates, from cargo's own metadata.
//!
//! ```text
//! store <- image <- memory, export        image, memory, export, qemu <- machine <- api <- tenby
//! ```

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{cargo, output_of};

/// Each crate and the crates of ours that it may use. One that is not here is a mistake too.
const MAY_USE: &[(&str, &[&str])] = &[
    ("store", &[]),
    ("image", &["store"]),
    ("memory", &["store", "image"]),
    ("export", &["store", "image"]),
    ("qemu", &[]),
    ("machine", &["store", "image", "memory", "export", "qemu"]),
    ("api", &["store", "image", "memory", "export", "qemu", "machine"]),
    ("tenby", &["store", "image", "memory", "export", "qemu", "machine", "api"]),
    // They look at the product from outside.
    ("e2e", &[]),
    ("fuzz", &["store", "image", "memory", "export", "qemu"]),
    ("xtask", &[]),
];

/// Crates of others that have their home in some of ours only.
const HOMES: &[(&str, &[&str])] = &[
    ("tokio", &["qemu", "machine", "api", "tenby", "fuzz"]),
    ("redb", &["machine"]),
    ("axum", &["api"]),
    ("io-uring", &["export"]),
    ("clap", &["tenby"]),
];

/// Fails with every edge that runs against the direction.
pub(crate) fn run() -> Result<()> {
    let metadata = output_of(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let edges = edges(&serde_json::from_str(&metadata)?)?;
    let wrong = wrong_edges(&edges);
    if !wrong.is_empty() {
        bail!("against the direction of dependencies:\n  {}", wrong.join("\n  "));
    }
    eprintln!("{} dependencies, all in the right direction", edges.len());
    Ok(())
}

/// A crate of ours and one that it names in its manifest, for whatever purpose.
#[derive(Debug, PartialEq, Eq)]
struct Edge {
    from: String,
    to: String,
    /// Whether `to` lies in the workspace.
    ours: bool,
}

fn edges(metadata: &Value) -> Result<Vec<Edge>> {
    let list =
        |value: &Value, key: &str| value[key].as_array().cloned().with_context(|| format!("cargo tells no {key}"));
    let name = |value: &Value| value["name"].as_str().map(str::to_owned).context("a crate without a name");
    let mut edges = Vec::new();
    for package in list(metadata, "packages")? {
        for dependency in list(&package, "dependencies")? {
            edges.push(Edge { from: name(&package)?, to: name(&dependency)?, ours: dependency["path"].is_string() });
        }
    }
    Ok(edges)
}

fn wrong_edges(edges: &[Edge]) -> Vec<String> {
    edges.iter().filter_map(|edge| Some(format!("{} -> {}: {}", edge.from, edge.to, objection(edge)?))).collect()
}

/// What speaks against an edge.
fn objection(edge: &Edge) -> Option<String> {
    if edge.ours {
        let Some((_, below)) = MAY_USE.iter().find(|(from, _)| *from == edge.from) else {
            return Some(format!("{} has no place in the table of xtask/src/check.rs", edge.from));
        };
        return (!below.contains(&edge.to.as_str())).then(|| match below {
            [] => format!("{} may use no other crate of ours", edge.from),
            _ => format!("{} may use only {}", edge.from, below.join(", ")),
        });
    }
    let (_, homes) = HOMES.iter().find(|(foreign, _)| *foreign == edge.to)?;
    (!homes.contains(&edge.from.as_str())).then(|| format!("{} is for {} only", edge.to, homes.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::{edges, wrong_edges};
    use serde_json::{Value, json};

    fn metadata(crates: &[(&str, &[&str])]) -> Value {
        let ours = |name: &str| super::MAY_USE.iter().any(|(one, _)| *one == name);
        let dependency = |name: &&str| json!({ "name": name, "path": ours(name).then_some("/somewhere") });
        let package = |(name, uses): &(&str, &[&str])| json!({ "name": name, "dependencies": uses.iter().map(dependency).collect::<Vec<_>>() });
        json!({ "packages": crates.iter().map(package).collect::<Vec<_>>() })
    }

    fn wrong(crates: &[(&str, &[&str])]) -> Vec<String> {
        wrong_edges(&edges(&metadata(crates)).unwrap())
    }

    #[test]
    fn the_right_direction_passes() {
        assert!(
            wrong(&[("store", &["rustix"]), ("image", &["store"]), ("machine", &["qemu", "redb", "tokio"])]).is_empty()
        );
    }

    #[test]
    fn a_wrong_edge_is_named() {
        assert_eq!(
            wrong(&[("store", &[]), ("qemu", &["image"])]),
            ["qemu -> image: qemu may use no other crate of ours"]
        );
        assert_eq!(wrong(&[("image", &["store", "export"])]), ["image -> export: image may use only store"]);
    }

    #[test]
    fn a_foreign_crate_away_from_home_is_named() {
        assert_eq!(
            wrong(&[("image", &["tokio"]), ("tenby", &["clap"])]),
            ["image -> tokio: tokio is for qemu, machine, api, tenby, fuzz only"]
        );
        assert_eq!(wrong(&[("api", &["redb", "axum"])]), ["api -> redb: redb is for machine only"]);
    }

    #[test]
    fn a_crate_that_nobody_placed_is_named() {
        assert_eq!(wrong(&[("helpers", &["store"])]).len(), 1);
    }

    #[test]
    fn every_crate_of_the_table_uses_only_what_lies_below() {
        let row = |name: &str| super::MAY_USE.iter().find(|(one, _)| *one == name).unwrap().1;
        for (name, below) in super::MAY_USE {
            assert!(below.iter().all(|other| !row(other).contains(name)), "{name} is in a circle");
        }
    }
}
