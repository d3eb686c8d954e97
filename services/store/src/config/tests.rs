use kvasir_block::Tenant;
use kvasir_cache::{AbsentDisk, Admission, Credentials, HugePages, StoreId};

use super::*;

fn budgets(mib: &[(&str, u64)]) -> BTreeMap<String, ByteSize> {
    let named = mib.iter();
    named
        .map(|(name, mib)| ((*name).to_owned(), ByteSize::mib(*mib)))
        .collect()
}

fn disks(dirs: &[&str]) -> Vec<DiskPlace> {
    let place = |dir: &&str| DiskPlace {
        dir: PathBuf::from(dir),
        bytes_max: ByteSize::gib(1),
    };
    dirs.iter().map(place).collect()
}

#[test]
fn defaults_are_valid_and_survive_toml() {
    let config = StoreConfig::default();
    config.validate().expect("valid");
    let json = serde_json::to_string(&config).expect("serialises");
    assert_eq!(serde_json::from_str::<StoreConfig>(&json).expect("reads back"), config);
    let unknown = serde_json::from_str::<StoreConfig>(r#"{"host_byte_max": "1GiB"}"#);
    assert!(
        unknown
            .expect_err("unknown")
            .to_string()
            .contains("unknown field `host_byte_max`")
    );
}

#[test]
fn what_cannot_work_names_the_key() {
    type Break = fn(&mut StoreConfig);
    let table: [(Break, &str); 21] = [
        (
            |c| c.listen = ([0, 0, 0, 0], 7401).into(),
            "store.listen = \"0.0.0.0:7401\"",
        ),
        (|c| c.admin_listen = ([10, 0, 0, 1], 1).into(), "store.admin_listen"),
        (|c| c.bulk_listen = ([0, 0, 0, 0], 7402).into(), "store.bulk_listen"),
        (|c| c.bulk_connections_max = 0, "store.bulk_connections_max is 0"),
        (|c| c.streams_max = 0, "store.streams_max is 0"),
        (|c| c.retrieval_threads = 0, "store.retrieval_threads is 0"),
        (
            |c| c.message_bytes_max = ByteSize::kib(1),
            "store.message_bytes_max = 1KiB",
        ),
        (
            |c| c.message_bytes_max = ByteSize::gib(4),
            "store.message_bytes_max = 4GiB",
        ),
        (|c| c.put_bytes_max = ByteSize::mib(1), "store.put_bytes_max = 1MiB"),
        (|c| c.promote_after_reads = 16, "store.promote_after_reads = 16"),
        (|c| c.reuse_entries = 0, "store.reuse_entries is 0"),
        (
            |c| c.tenant_host_bytes_max = budgets(&[("", 1)]),
            "store.tenant_host_bytes_max names a tenant of 0 bytes",
        ),
        (
            |c| c.tenant_host_bytes_max = budgets(&[("blue", 2), ("red", 2048)]),
            "store.tenant_host_bytes_max.red = 2GiB: there are only store.host_bytes_max = 1GiB",
        ),
        (
            |c| c.tenant_host_bytes_max_default = ByteSize::gib(2),
            "store.tenant_host_bytes_max_default = 2GiB",
        ),
        (|c| c.disks = disks(&["", "/b"]), "store.disks has a disk without dir"),
        (|c| c.disks = disks(&["/a", "/a"]), "store.disks names /a twice"),
        (
            |c| {
                c.disks = disks(&["/a"]);
                c.disks[0].bytes_max = ByteSize::mib(256);
            },
            "store.disks: /a has bytes_max = 256MiB",
        ),
        (|c| c.disk_absent_ok = true, "store.disk_absent_ok needs several"),
        (
            |c| c.object_credentials_file = "/key".into(),
            "store.object_credentials_file is set and store.object_url is not",
        ),
        (
            |c| c.object_url = "https://bucket".to_owned(),
            "store.object_url = \"https://bucket\"",
        ),
        (
            |c| {
                c.object_url = "s3://bucket/kv".to_owned();
                c.object_endpoint = "http://minio:9000".to_owned();
            },
            "store.object_endpoint = \"http://minio:9000\"",
        ),
    ];
    for (damage, expected) in table {
        let mut config = StoreConfig::default();
        damage(&mut config);
        let error = config.validate().expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn each_key_of_the_tiers_reaches_the_cache() {
    let text = r#"{
        "host_bytes_max": "2GiB", "host_policy": "s3-fifo", "huge_pages": false,
        "host_ready_bytes": "7MiB",
        "tenant_host_bytes_max": {"blue": "512MiB", "red": "0B"}, "tenant_host_bytes_max_default": "1GiB",
        "disk_admission": "reuse", "promote_after_reads": 2, "reuse_entries": 4096,
        "prefetch_layers": 3, "prefetch_bytes_max": "1MiB",
        "disks": [{"dir": "/a", "bytes_max": "1GiB"}, {"dir": "/b", "bytes_max": "3GiB"}],
        "disk_absent_ok": true, "disk_free_bytes_min": "5MiB", "scrub_bytes_per_second": "0B"
    }"#;
    let config: StoreConfig = serde_json::from_str(text).expect("reads");
    config.validate().expect("valid");
    let cache = config.cache();
    let budget = |name| cache.tenant_host_bytes_max[&Tenant::new(name).expect("a name")];
    assert_eq!(
        (cache.host_policy, cache.huge_pages),
        (HostPolicy::S3Fifo, HugePages::Off)
    );
    assert_eq!(cache.host_ready_bytes, 7 << 20);
    assert_eq!((budget("blue"), budget("red")), (512 << 20, 0));
    assert_eq!(cache.tenant_host_bytes_max_default, Some(1 << 30));
    assert_eq!((cache.disk_admission, cache.promote_after_reads), (Admission::Reuse, 2));
    assert_eq!(
        (cache.reuse_entries, cache.prefetch_layers, cache.prefetch_bytes_max),
        (4096, 3, 1 << 20)
    );
    let places: Vec<_> = (cache.disks.iter().map(|disk| (disk.dir.to_str(), disk.bytes_max))).collect();
    assert_eq!(places, [(Some("/a"), 1 << 30), (Some("/b"), 3 << 30)]);
    assert_eq!(
        (
            cache.disk_absent,
            cache.disk_free_bytes_min,
            cache.scrub_bytes_per_second
        ),
        (AbsentDisk::LeaveOut, 5 << 20, 0)
    );
    let json = serde_json::to_string(&config).expect("serialises");
    assert_eq!(serde_json::from_str::<StoreConfig>(&json).expect("reads back"), config);
}

#[test]
fn nothing_said_of_tenants_means_that_they_share() {
    let cache = StoreConfig::default().cache();
    assert_eq!(cache.tenant_host_bytes_max_default, None);
    assert!(cache.tenant_host_bytes_max.is_empty());
    assert_eq!(
        (cache.host_policy, cache.huge_pages),
        (HostPolicy::Prefix, HugePages::Auto)
    );
}

#[test]
fn a_policy_that_is_not_known_is_answered_with_those_that_are() {
    let error = serde_json::from_str::<StoreConfig>(r#"{"host_policy": "mru"}"#).expect_err("unknown");
    assert!(
        error
            .to_string()
            .contains("unknown host_policy `mru`: choose one of lru, s3-fifo, prefix"),
        "{error}"
    );
}

#[test]
fn the_bucket_and_its_key() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("key");
    let mut config = StoreConfig {
        object_url: "s3://bucket/kv".to_owned(),
        object_endpoint: "https://minio:9000".to_owned(),
        object_region: "eu-1".to_owned(),
        ..StoreConfig::default()
    };
    config.validate().expect("valid");
    let store = StoreId::from_u64(7);
    let object = config.object(store).expect("no key to read").expect("configured");
    assert_eq!((object.store, object.credentials), (store, Credentials::Anonymous));
    assert_eq!(object.endpoint.as_deref(), Some("https://minio:9000"));
    assert!(object.path_style && !object.allow_http && object.region == "eu-1");
    config.object_credentials_file.clone_from(&file);
    let error = config.object(store).expect_err("no file").to_string();
    assert!(error.contains("store.object_credentials_file: cannot read"), "{error}");
    let key = |token: Option<&str>| Credentials::Key {
        id: "id".to_owned(),
        secret: "secret".to_owned(),
        token: token.map(str::to_owned),
    };
    let cases = [
        ("id\nsecret\n", Some(key(None))),
        ("\n id \n\n secret \n token\n", Some(key(Some("token")))),
        ("id\n", None),
    ];
    for (text, expected) in cases {
        std::fs::write(&file, text).expect("writes");
        match (config.object(store), expected) {
            (Ok(Some(object)), Some(expected)) => assert_eq!(object.credentials, expected),
            (Err(error), None) => assert!(error.to_string().contains("a line each"), "{error}"),
            (other, _) => panic!("{text:?}: {other:?}"),
        }
    }
    config.object_url.clear();
    assert!(config.object(store).expect("nothing to read").is_none());
}
