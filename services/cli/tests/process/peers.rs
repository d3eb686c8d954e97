//! The comparison with other stores (`tests/peers`), as far as it goes without them: its own tests, its help, its plan.

use std::{
    path::Path,
    process::{Command, Output},
};

fn in_repository(program: &str, args: &[&str]) -> Output {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    Command::new(program)
        .args(args)
        .current_dir(repository)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .expect("bash and python3 are there: `deploy/bootstrap.sh system` installs them")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn its_arithmetic_is_right() {
    let done = in_repository("python3", &["tests/peers/test_peers.py"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("OK"), "{}", text(&done.stderr));
}

#[test]
fn help_plan_and_tables_want_no_peers() {
    let recorded = include_str!("../../../../tests/peers/recorded/peers.md");
    let table = [
        (&["--help"][..], "--rounds"),
        (
            &["--dry-run", "--sizes", "1MiB", "--batches", "16"],
            "put 1 MiB x 16: kvasir-bulk, kvasir-grpc, kvasir-local, mooncake, lmcache, redis, bare; 5 rounds of 1.5 s",
        ),
        (&["--summarise", "tests/peers/recorded/peers.json"], recorded),
    ];
    for (args, expected) in table {
        let done = in_repository("tests/peers/run.sh", args);
        assert!(done.status.success(), "{args:?}: {}", text(&done.stderr));
        assert!(
            text(&done.stdout).contains(expected),
            "{args:?}: {}",
            text(&done.stdout)
        );
    }
    let refused = in_repository("tests/peers/run.sh", &["--dry-run", "--systems", "nobody"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        text(&refused.stderr).contains("kvasir-bulk"),
        "{}",
        text(&refused.stderr)
    );
}
