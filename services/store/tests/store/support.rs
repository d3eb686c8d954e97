//! A store on free ports in a temporary folder, and blocks to put into it.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use kvasir_block::{BlockHash, Checksum, Dtype, ExtraKeys, KvSchema, RopeStyle, Tenant, block_hashes};
use kvasir_client::{ClientConfig, DataPath, GotBlock, LayerBlock, Namespace, PutBlock, PutOutcome, StoreClient};
use kvasir_proto::v1::block_store_client::BlockStoreClient;
use kvasir_runtime::{Runtime, units::ByteSize};
use kvasir_store::{Store, StoreConfig};
use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tonic::transport::Channel;

pub(crate) const LAYERS: u16 = 3;

/// 4 KiB per layer block.
pub(crate) fn schema() -> KvSchema {
    KvSchema {
        model: "test".to_owned(),
        weights_sha256: [1; 32],
        tokenizer_sha256: [2; 32],
        adapter_sha256: None,
        layers: LAYERS,
        kv_heads: 2,
        head_dim: 32,
        block_tokens: 16,
        dtype: Dtype::F16,
        attention: "full".to_owned(),
        rope_theta: 1e5,
        rope_dims: 32,
        rope_style: RopeStyle::Interleaved,
        rope_scaling: "none".to_owned(),
        tp_rank: 0,
        tp_world: 1,
        numerics: "test/1".to_owned(),
    }
}

pub(crate) fn tenant() -> Tenant {
    Tenant::new("default").expect("not empty")
}

/// Names of `blocks` blocks of a prompt made from `seed`.
pub(crate) fn chain(seed: u32, blocks: usize) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..blocks * 16)
        .map(|i| i as u32 ^ seed.wrapping_mul(2_654_435_761))
        .collect();
    block_hashes(&tokens, 16, &ExtraKeys::none())
}

/// The random but right payload of a layer block.
pub(crate) fn payload(hash: BlockHash, layer: u16, bytes: usize) -> Bytes {
    let name = Checksum::of(hash.as_bytes()).to_u32();
    let mut random = SmallRng::seed_from_u64(u64::from(name) << 16 | u64::from(layer));
    let mut payload = vec![0; bytes];
    random.fill_bytes(&mut payload);
    payload.into()
}

pub(crate) fn layer_block(hash: BlockHash, layer: u16) -> LayerBlock {
    let payload = payload(hash, layer, schema().layer_block_bytes());
    LayerBlock {
        hash,
        layer,
        checksum: Checksum::of(&payload),
        payload,
    }
}

pub(crate) fn config(dir: &Path) -> StoreConfig {
    StoreConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        admin_listen: ([127, 0, 0, 1], 0).into(),
        data_dir: dir.join("store"),
        host_bytes_max: ByteSize::mib(64),
        disk_bytes_max: ByteSize::mib(256),
        segment_bytes: ByteSize::mib(8),
        ..StoreConfig::default()
    }
}

/// A running store, its client, and a namespace.
pub(crate) struct Setup {
    pub(crate) store: Store,
    pub(crate) client: StoreClient,
    pub(crate) namespace: Namespace,
}

impl Setup {
    pub(crate) async fn with(config: &StoreConfig) -> Self {
        let store = Store::start(config, &Runtime::new()).await.expect("a store");
        let client = client(&store);
        let namespace = client.open_namespace(&tenant(), &schema()).await.expect("a namespace");
        Self {
            store,
            client,
            namespace,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.store.grpc_addr())
    }

    /// A client that takes a path, and its namespace.
    pub(crate) async fn by(&self, path: DataPath) -> (StoreClient, Namespace) {
        let client = StoreClient::new(config_by(path, &self.url())).expect("a client");
        let namespace = client.open_namespace(&tenant(), &schema()).await.expect("a namespace");
        (client, namespace)
    }

    /// tonic's own client of the same store.
    pub(crate) async fn stock(&self) -> BlockStoreClient<Channel> {
        BlockStoreClient::connect(self.url()).await.expect("a connection")
    }

    /// Puts all layers of all blocks, layer after layer.
    pub(crate) async fn put(&self, chain: &[BlockHash]) -> Vec<(BlockHash, u16, PutOutcome)> {
        let mut stream = self.client.put_blocks(&self.namespace).await.expect("a stream");
        for (hash, layer) in in_order(chain) {
            stream.put(layer_block(hash, layer)).await.expect("queued");
        }
        stream.finish().await.expect("outcomes")
    }

    /// Gets all layers of all blocks.
    pub(crate) async fn get(&self, chain: &[BlockHash]) -> Vec<GotBlock> {
        let mut stream = self
            .client
            .get_blocks(&self.namespace, chain, 0..LAYERS, None, None)
            .await
            .expect("a stream");
        let mut blocks = Vec::new();
        while let Some(block) = stream.next().await.expect("a block") {
            blocks.push(block);
        }
        blocks
    }

    pub(crate) async fn hit_blocks(&self, chain: &[BlockHash]) -> usize {
        self.client
            .match_prefix(self.namespace.id, chain, None)
            .await
            .expect("a match")
            .hit_blocks
    }
}

pub(crate) fn client(store: &Store) -> StoreClient {
    StoreClient::new(config_by(DataPath::Auto, &format!("http://{}", store.grpc_addr()))).expect("a client")
}

/// Of a client that takes a path.
pub(crate) fn config_by(path: DataPath, url: &str) -> ClientConfig {
    ClientConfig {
        path,
        call_timeout: Duration::from_secs(20),
        ..ClientConfig::to(url)
    }
}

/// What a blocking put wants of blocks.
pub(crate) fn put_blocks(blocks: &[LayerBlock]) -> Vec<PutBlock<'_>> {
    blocks
        .iter()
        .map(|block| PutBlock {
            hash: block.hash,
            layer: block.layer,
            checksum: block.checksum,
            payload: &block.payload,
        })
        .collect()
}

/// All layer blocks of a chain in the order of puts and gets.
pub(crate) fn in_order(chain: &[BlockHash]) -> impl Iterator<Item = (BlockHash, u16)> {
    (0..LAYERS).flat_map(move |layer| chain.iter().map(move |hash| (*hash, layer)))
}
