use std::path::Path;

use serde::Deserialize;

use super::*;
use crate::units::{ByteSize, HumanDuration};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Tree {
    store: Store,
    router: Router,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Store {
    listen: String,
    host_bytes_max: ByteSize,
    sync_every: HumanDuration,
    threads: Option<usize>,
    share: f32,
    tier: Tier,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Tier {
    mode: Mode,
    names: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    #[default]
    Host,
    Disk,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Router {
    queue_len_max: u32,
    strict: bool,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:7401".to_owned(),
            host_bytes_max: ByteSize::mib(256),
            sync_every: HumanDuration::millis(250),
            threads: None,
            share: 0.99,
            tier: Tier::default(),
        }
    }
}

fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn file(text: &str) -> Loader {
    Loader::new().text(Path::new("kvasir.toml"), text)
}

#[test]
fn later_layers_win_and_provenance_is_kept() {
    let text = "[store]\nlisten = \"127.0.0.1:1\"\nhost_bytes_max = 1024\n\n[store.tier]\nmode = \"disk\"\n";
    let loaded = file(text)
        .environment(variables(&[
            ("KVASIR__STORE__HOST_BYTES_MAX", "2KiB"),
            ("PATH", "/bin"),
            ("KVASIR_MODEL", "x"),
        ]))
        .set("router.strict=true")
        .flag("--threads", "store.threads", 3)
        .load(Tree::default())
        .expect("all values are good");
    let store = &loaded.tree.store;
    assert_eq!(
        (store.listen.as_str(), store.host_bytes_max),
        ("127.0.0.1:1", ByteSize::kib(2))
    );
    assert_eq!(
        (store.threads, store.tier.mode, loaded.tree.router.strict),
        (Some(3), Mode::Disk, true)
    );
    let table = [
        ("store.listen", "kvasir.toml:2"),
        ("store.host_bytes_max", "KVASIR__STORE__HOST_BYTES_MAX"),
        ("store.tier.mode", "kvasir.toml:6"),
        ("store.sync_every", "default"),
        ("store.threads", "--threads"),
        ("router.strict", "--set router.strict=true"),
    ];
    for (key, source) in table {
        assert_eq!(loaded.source(key).to_string(), source, "{key}");
    }
}

#[test]
fn explain_lists_every_key_also_unset_ones() {
    let loaded = file("[store]\nsync_every = \"1s\"\n")
        .load(Tree::default())
        .expect("good");
    let lines: Vec<String> = loaded
        .explain()
        .iter()
        .map(|line| {
            format!(
                "{} = {} ({})",
                line.key,
                line.value.as_deref().unwrap_or("unset"),
                line.source
            )
        })
        .collect();
    let expected = [
        "router.queue_len_max = 0 (default)",
        "router.strict = false (default)",
        "store.host_bytes_max = \"256MiB\" (default)",
        "store.listen = \"127.0.0.1:7401\" (default)",
        "store.share = 0.99 (default)",
        "store.sync_every = \"1s\" (kvasir.toml:2)",
        "store.threads = unset (default)",
        "store.tier.mode = \"host\" (default)",
        "store.tier.names = [] (default)",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn text_from_outside_is_read_as_the_tree_wants_it() {
    let table = [
        ("store.threads=4", "store.threads", "4"),
        ("store.listen=7401", "store.listen", "\"7401\""),
        ("store.listen=\"a b\"", "store.listen", "\"a b\""),
        ("store.listen=true", "store.listen", "\"true\""),
        ("store.tier.names=[\"a\", \"b\"]", "store.tier.names", "[\"a\", \"b\"]"),
        ("store.share=0.5", "store.share", "0.5"),
        ("store.host_bytes_max=4096", "store.host_bytes_max", "\"4KiB\""),
    ];
    for (assignment, key, printed) in table {
        let loaded = Loader::new()
            .set(assignment)
            .load(Tree::default())
            .unwrap_or_else(|error| panic!("{error}"));
        let line = loaded.explain().iter().find(|line| line.key == key).expect(key);
        assert_eq!(line.value.as_deref(), Some(printed), "{assignment}");
    }
}

#[test]
fn mistakes_name_place_key_and_remedy() {
    let lines = |text: &str| file(text);
    let env = |name: &str, value: &str| Loader::new().environment(variables(&[(name, value)]));
    let table = [
        (
            lines("[store]\n\nhost_byte_max = 5\n"),
            "kvasir.toml:3: store.host_byte_max: there is no such key; did you mean `store.host_bytes_max`?",
        ),
        (
            lines("[stor]\n"),
            "kvasir.toml:1: stor: there is no such key; did you mean `store`?",
        ),
        (
            lines("[store]\nqueue_len_max = 5\n"),
            "kvasir.toml:2: store.queue_len_max: there is no such key; did you mean `router.queue_len_max`?",
        ),
        (
            lines("[router]\nzzz = 5\n"),
            "kvasir.toml:2: router.zzz: there is no such key; the keys here are queue_len_max, strict",
        ),
        (
            lines("[store]\nsync_every = 5\n"),
            "kvasir.toml:2: store.sync_every: \"5\" is not a duration: write a number and a unit, as in \"250ms\", \"30s\" or \"5m\"",
        ),
        (
            lines("[store.tier]\nmode = \"disc\"\n"),
            "kvasir.toml:2: store.tier.mode: \"disc\" is not one of host, disk; did you mean \"disk\"?",
        ),
        (
            lines("[router]\nqueue_len_max = -1\n"),
            "kvasir.toml:2: router.queue_len_max: invalid value",
        ),
        (
            lines("[router]\nstrict = 1\n"),
            "kvasir.toml:2: router.strict: invalid type: integer `1`, expected a boolean",
        ),
        (lines("store = 5\n"), "kvasir.toml:1: store: invalid type"),
        (lines("[store]\nlisten = \n"), "kvasir.toml:2: is not TOML"),
        (
            lines("[store]\nlisten = \"a\"\nlisten = \"b\"\n"),
            "kvasir.toml:3: is not TOML: duplicate key",
        ),
        (
            env("KVASIR__STORE__HOST_BYTES_MAX", "lots"),
            "KVASIR__STORE__HOST_BYTES_MAX: store.host_bytes_max: \"lots\" is not a size",
        ),
        (
            env("KVASIR__ROUTR__STRICT", "true"),
            "KVASIR__ROUTR__STRICT: routr.strict: there is no such key; did you mean `router`?",
        ),
        (env("KVASIR__", "1"), "KVASIR__: : there is no such key"),
        (
            Loader::new().set("store.listen"),
            "--set store.listen: is not an assignment",
        ),
        (
            Loader::new().set("router.strict=maybe"),
            "--set router.strict=maybe: router.strict: invalid type",
        ),
        (
            Loader::new().file(Path::new("/nowhere/kvasir.toml")),
            "/nowhere/kvasir.toml: cannot be read",
        ),
    ];
    for (loader, expected) in table {
        let error = loader.load(Tree::default()).expect_err(expected).to_string();
        assert!(error.starts_with(expected), "got      {error}\nexpected {expected}");
    }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let error = file("[store]\nlisten = 1\nshare = \"x\"\n")
        .environment(variables(&[("KVASIR__ROUTER__STRICT", "maybe")]))
        .load(Tree::default())
        .expect_err("three mistakes");
    assert_eq!(error.problems().len(), 3, "{error}");
}

#[test]
fn a_missing_optional_file_is_no_mistake() {
    let loaded = Loader::new()
        .file_if_present(Path::new("/nowhere/kvasir.toml"))
        .load(Tree::default())
        .expect("good");
    assert_eq!(loaded.tree, Tree::default());
    assert_eq!(loaded.file, None);
}
