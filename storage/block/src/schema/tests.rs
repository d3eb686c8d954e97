use super::*;

fn schema() -> KvSchema {
    KvSchema {
        model: "m".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: 30,
        kv_heads: 3,
        head_dim: 64,
        block_tokens: 64,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 64,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "cpu-q8/1".to_owned(),
    }
}

/// One mutation per field, with the name that `first_difference` must report.
type Mutation = (&'static str, fn(&mut KvSchema));

const MUTATIONS: &[Mutation] = &[
    ("model", |s| s.model.push('x')),
    ("weights_sha256", |s| s.weights_sha256[31] ^= 1),
    ("tokenizer_sha256", |s| s.tokenizer_sha256[0] ^= 1),
    ("adapter_sha256", |s| s.adapter_sha256 = Some([0; 32])),
    ("layers", |s| s.layers += 1),
    ("kv_heads", |s| s.kv_heads += 1),
    ("head_dim", |s| s.head_dim += 1),
    ("block_tokens", |s| s.block_tokens += 1),
    ("dtype", |s| s.dtype = Dtype::Bf16),
    ("attention", |s| s.attention = "window".to_owned()),
    ("rope_theta", |s| {
        s.rope_theta = f32::from_bits(s.rope_theta.to_bits() + 1)
    }),
    ("rope_dims", |s| s.rope_dims -= 2),
    ("rope_style", |s| s.rope_style = RopeStyle::Halves),
    ("rope_scaling", |s| s.rope_scaling = "linear:2".to_owned()),
    ("tp_rank", |s| s.tp_rank += 1),
    ("tp_world", |s| s.tp_world += 1),
    ("numerics", |s| s.numerics = "cuda/1".to_owned()),
];

#[test]
fn every_field_is_part_of_the_identity() {
    let tenant = Tenant::new("default").unwrap();
    let plain = schema();
    for (field, mutate) in MUTATIONS {
        let mut changed = plain.clone();
        mutate(&mut changed);
        assert_ne!(changed.fingerprint(), plain.fingerprint(), "{field}");
        assert_ne!(
            NamespaceId::new(&tenant, &changed),
            NamespaceId::new(&tenant, &plain),
            "{field}"
        );
        assert_eq!(plain.first_difference(&changed), Some(*field));
    }
    // 17 fields of the struct; layout and hash scheme are constants.
    assert_eq!(MUTATIONS.len() + 2, plain.fields().len());
}

#[test]
fn a_model_keeps_its_name_however_its_blocks_are_cut() {
    let plain = schema();
    for (field, mutate) in MUTATIONS {
        let mut changed = plain.clone();
        mutate(&mut changed);
        let same = matches!(
            *field,
            "model" | "tokenizer_sha256" | "block_tokens" | "dtype" | "numerics"
        );
        assert_eq!(
            changed.model_fingerprint() == plain.model_fingerprint(),
            same,
            "{field}"
        );
    }
    assert_ne!(plain.model_fingerprint(), plain.fingerprint());
}

#[test]
fn tenants_do_not_share_namespaces() {
    let id = |name: &str| NamespaceId::new(&Tenant::new(name).unwrap(), &schema());
    assert_ne!(id("a"), id("b"));
    assert!(Tenant::new("").is_none());
}

#[test]
fn neighbouring_fields_cannot_be_confused() {
    let (mut a, mut b) = (schema(), schema());
    (a.attention, a.rope_scaling) = ("fullnone".to_owned(), String::new());
    (b.attention, b.rope_scaling) = ("full".to_owned(), "none".to_owned());
    assert_ne!(a.fingerprint(), b.fingerprint());
}

#[test]
fn out_of_range_schemas_are_refused_by_name() {
    let cases: &[Mutation] = &[
        ("layers", |s| s.layers = 0),
        ("kv_heads", |s| s.kv_heads = 0),
        ("head_dim", |s| s.head_dim = 0),
        ("block_tokens", |s| s.block_tokens = 0),
        ("model", |s| s.model.clear()),
        ("tp_rank", |s| s.tp_rank = 1),
        ("block_tokens", |s| {
            (s.kv_heads, s.head_dim, s.block_tokens) = (u16::MAX, u16::MAX, u16::MAX);
        }),
    ];
    assert_eq!(schema().validate(), Ok(()));
    for (field, mutate) in cases {
        let mut bad = schema();
        mutate(&mut bad);
        assert_eq!(bad.validate().map_err(|error| error.field), Err(*field));
    }
}
