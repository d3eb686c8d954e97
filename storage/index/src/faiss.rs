//! faiss' own inverted lists and graph, by the crate `faiss`: what others' systems are made of, as baselines.
//!
//! Only behind the cargo feature `faiss`, which builds faiss from source (C++, CMake, BLAS: `deploy/bootstrap.sh faiss`). Both are
//! made and searched by product over f32 rows, as their users make them; keys that were found are scored again where they lie, for
//! equal bits with other indexes. What the lists cost is counted from their sizes and from the lists that a query probes, which the
//! quantizer says. The graph counts its steps where no binding reaches, so its searches say no cost ([`KeyIndex::counts`]).
//!
//! Files hold keys, not what faiss made of them (its own format is read from disk alone), so decoding builds again.

use faiss::{
    Index as _, MetricType,
    cluster::{Clustering, ClusteringParameters},
    index::{IndexImpl, autotune::ParameterSpace, flat::FlatIndex, index_factory, ivf_flat::IVFFlatIndex},
};
use half::f16;
use parking_lot::Mutex;

use crate::{
    Cost, Hits, IndexError, KeyIndex, KeyRows, Search,
    file::{self, Fields, Kind, Origin},
    search::{Best, budget, check, check_rows, hits, is_finite, score},
};

const VERSION: u16 = 1;
/// Of k-means, as `IndexIVF` has by default.
const ITERATIONS: u32 = 10;
/// Neighbours per key and layer of the graph; twice as many in the lowest.
const NEIGHBOURS: usize = 32;
/// Width of the search that inserts, as elsewhere here; faiss' default is 40.
const BUILD_WIDTH: f64 = 200.0;
/// Keys that the graph takes at once. Of more faiss has several threads insert, and the graph is another one each time.
const ADDED_AT_ONCE: usize = 100;
/// Keys scored per key of search width, about: the width is chosen from the effort by it.
const SCORED_PER_WIDTH: usize = 8;

/// Rows given to faiss, and where they stand.
struct Rows {
    origin: Origin,
    head_dim: usize,
    /// All keys that were appended.
    keys: Vec<f16>,
    /// Position of each row that faiss has: those that are numbers.
    positions: Vec<u32>,
}

impl Rows {
    fn new(head_dim: usize, origin: Origin) -> Result<Self, IndexError> {
        if !(1..=1024).contains(&head_dim) {
            return Err(IndexError::Invalid {
                argument: "head_dim",
                problem: format!("{head_dim} is not 1 to 1024"),
            });
        }
        Ok(Self {
            origin,
            head_dim,
            keys: Vec::new(),
            positions: Vec::new(),
        })
    }

    fn len(&self) -> usize {
        self.keys.len() / self.head_dim
    }

    /// Takes keys in, and answers those that are numbers, as f32.
    fn take(&mut self, keys: &[f16]) -> Result<Vec<f32>, IndexError> {
        check_rows(keys, self.head_dim, self.len())?;
        let mut rows = Vec::with_capacity(keys.len());
        for (position, key) in (self.len()..).zip(keys.chunks_exact(self.head_dim)) {
            if is_finite(key) {
                rows.extend(key.iter().map(|x| x.to_f32()));
                self.positions.push(position as u32);
            }
        }
        self.keys.extend_from_slice(keys);
        Ok(rows)
    }

    /// The rows that faiss named for each head, scored again and ranked.
    fn rank(&self, search: &Search<'_>, labels: &[faiss::Idx], per_head: usize) -> Vec<Best> {
        let mut best = Vec::new();
        for (head, labels) in labels.chunks_exact(per_head.max(1)).enumerate() {
            let mut one = Best::new(search.k);
            // A label of none stands where faiss found fewer.
            for position in labels
                .iter()
                .filter_map(|label| self.positions.get(label.get()? as usize))
            {
                if !search.excluded.contains(*position) {
                    one.push(*position, score(search, head, search.keys.row(*position as usize)));
                }
            }
            best.push(one);
        }
        best
    }

    /// Rows that must be asked for so that `k` are left without the excluded.
    fn asked(&self, search: &Search<'_>) -> usize {
        let searched: usize = search
            .excluded
            .searched(0..self.len() as u32)
            .map(|range| range.len())
            .sum();
        search.k.saturating_add(self.len() - searched).min(self.positions.len())
    }

    fn encode(&self, kind: Kind) -> Vec<u8> {
        let mut payload = Vec::with_capacity(2 * self.keys.len());
        file::put_halves(&mut payload, &self.keys);
        file::seal(kind, VERSION, self.head_dim, self.len(), self.origin, &payload)
    }

    fn decode(bytes: &[u8], kind: Kind, origin: Origin) -> Result<(usize, Vec<f16>), IndexError> {
        let frame = file::open(bytes, kind, VERSION, origin)?;
        let mut fields = Fields::new(frame.payload);
        let keys = fields.halves(frame.keys.saturating_mul(frame.head_dim))?;
        fields.finish()?;
        Ok((frame.head_dim, keys))
    }
}

/// Queries as faiss takes them: the sign of the scale, which decides what is best, goes into the rows.
fn signed(search: &Search<'_>) -> Vec<f32> {
    search.q.iter().map(|x| x * search.scale.signum()).collect()
}

/// A failure inside of faiss: memory, or a build that cannot be.
fn failed(error: faiss::error::Error) -> IndexError {
    IndexError::Unusable(format!("faiss failed: {error}"))
}

/// Inverted lists (`IndexIVFFlat`) under centroids that are compared by product.
pub struct FaissIvf {
    rows: Rows,
    /// `None` while there is no key.
    index: Option<Mutex<IVFFlatIndex>>,
    /// The centroids once more, to know which lists are probed.
    quantizer: Mutex<FlatIndex>,
    /// Keys of each list.
    sizes: Vec<u32>,
}

impl FaissIvf {
    /// Clusters `keys` into `lists`; `None` takes 4 times the square root of their number, the least that faiss advises.
    ///
    /// # Errors
    /// [`IndexError`] if `lists` is 0, there are more keys than 32 bits count, or faiss fails.
    pub fn build(keys: KeyRows<'_>, lists: Option<usize>, origin: Origin) -> Result<Self, IndexError> {
        let head_dim = keys.head_dim();
        if lists == Some(0) {
            return Err(IndexError::Invalid {
                argument: "lists",
                problem: "0 lists hold nothing; ask for at least 1".to_owned(),
            });
        }
        let quantizer = FlatIndex::new_ip(head_dim as u32).map_err(failed)?;
        let mut out = Self {
            rows: Rows::new(head_dim, origin)?,
            index: None,
            quantizer: Mutex::new(quantizer),
            sizes: Vec::new(),
        };
        let rows = out.rows.take(&keys.blocks().concat())?;
        let count = out.rows.positions.len();
        let lists = lists
            .unwrap_or_else(|| (4.0 * (count as f64).sqrt()) as usize)
            .min(count);
        if lists > 0 {
            out.train(&rows, lists)?;
            out.add(&rows)?;
        }
        Ok(out)
    }

    /// Reads what [`KeyIndex::encode`] wrote and clusters again.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let (head_dim, keys) = Rows::decode(bytes, Kind::FaissIvf, origin)?;
        let rows = keys.len() / head_dim;
        Self::build(KeyRows::new(&[&keys], rows.max(1), head_dim), None, origin)
    }

    /// Clusters as `IndexIVF` does for products. Twice the same centroids: faiss keeps its quantizer to itself, and what it would
    /// probe must be known here.
    fn train(&mut self, rows: &[f32], lists: usize) -> Result<(), IndexError> {
        let (d, count) = (self.rows.head_dim as u32, lists as u32);
        let mut params = ClusteringParameters::new();
        params.set_niter(ITERATIONS);
        params.set_spherical(true);
        params.set_min_points_per_centroid(1);
        let mut clustering = Clustering::new_with_params(d, count, &params).map_err(failed)?;
        let mut assigning = index_factory(d, "Flat", MetricType::InnerProduct).map_err(failed)?;
        clustering.train(rows, &mut assigning).map_err(failed)?;
        let centroids = clustering.centroids().map_err(failed)?.concat();
        let mut own = FlatIndex::new_ip(d).map_err(failed)?;
        own.add(&centroids).map_err(failed)?;
        self.quantizer.get_mut().add(&centroids).map_err(failed)?;
        let mut index = IVFFlatIndex::new_ip(own, d, count).map_err(failed)?;
        index.train(rows).map_err(failed)?;
        self.index = Some(Mutex::new(index));
        self.sizes = vec![0; lists];
        Ok(())
    }

    /// Keys in all of `lists`.
    fn keys_in(&self, lists: &[usize]) -> u64 {
        lists.iter().map(|list| u64::from(self.sizes[*list])).sum()
    }

    fn add(&mut self, rows: &[f32]) -> Result<(), IndexError> {
        let Some(index) = &mut self.index else { return Ok(()) };
        if rows.is_empty() {
            return Ok(());
        }
        index.get_mut().add(rows).map_err(failed)?;
        let nearest = self.quantizer.get_mut().assign(rows, 1).map_err(failed)?;
        for list in nearest.labels.iter().filter_map(|list| list.get()) {
            self.sizes[list as usize] += 1;
        }
        Ok(())
    }
}

impl KeyIndex for FaissIvf {
    fn name(&self) -> &'static str {
        "ivf-faiss"
    }

    fn keys(&self) -> usize {
        self.rows.len()
    }

    /// Rows and centroids as f32, and an id of 8 bytes per key.
    fn bytes(&self) -> usize {
        (self.rows.positions.len() + self.sizes.len()) * self.rows.head_dim * 4 + self.rows.positions.len() * 8
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        let rows = self.rows.take(keys)?;
        if self.index.is_none() && !rows.is_empty() {
            self.train(&rows, 1)?;
        }
        self.add(&rows)
    }

    /// As many lists are probed for each head as its share of the keys holds, at least one.
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.rows.head_dim, self.rows.len())?;
        let Some(index) = &self.index else {
            return Ok(hits(vec![Best::new(search.k); heads], Cost::default()));
        };
        let (d, lists) = (self.rows.head_dim, self.sizes.len());
        let (most, asked) = (budget(search, self.rows.len()) as u64, self.rows.asked(search));
        let q = signed(search);
        let order = self.quantizer.lock().assign(&q, lists).map_err(failed)?;
        let (mut labels, mut probed, mut keys_scored) = (Vec::new(), Vec::new(), 0);
        let mut index = index.lock();
        for (q, order) in q.chunks_exact(d).zip(order.labels.chunks_exact(lists)) {
            let mut held = 0;
            let order = order.iter().filter_map(|list| Some(list.get()? as usize));
            let within = |list: &usize| {
                held += u64::from(self.sizes[*list]);
                held <= most
            };
            let mut own: Vec<usize> = order.clone().take_while(within).collect();
            if own.is_empty() {
                own.extend(order.take(1));
            }
            keys_scored += self.keys_in(&own);
            index.set_nprobe(own.len() as u32);
            labels.extend(index.search(q, asked).map_err(failed)?.labels);
            probed.append(&mut own);
        }
        // A list that several heads probe counts once, as kind as can be.
        probed.sort_unstable();
        probed.dedup();
        let row = d as u64 * 4;
        let cost = Cost {
            keys_scored,
            bytes_read: lists as u64 * row + self.keys_in(&probed) * (row + 8),
        };
        Ok(hits(self.rows.rank(search, &labels, asked), cost))
    }

    fn encode(&self) -> Vec<u8> {
        self.rows.encode(Kind::FaissIvf)
    }
}

/// A graph (`IndexHNSWFlat`) with edges by product.
pub struct FaissHnsw {
    rows: Rows,
    index: Mutex<IndexImpl>,
}

impl FaissHnsw {
    /// An empty graph.
    ///
    /// # Errors
    /// [`IndexError`] if `head_dim` is not 1 to 1024, or faiss fails.
    pub fn new(head_dim: usize, origin: Origin) -> Result<Self, IndexError> {
        let rows = Rows::new(head_dim, origin)?;
        let kind = format!("HNSW{NEIGHBOURS},Flat");
        let index = index_factory(head_dim as u32, kind, MetricType::InnerProduct).map_err(failed)?;
        set(&index, "efConstruction", BUILD_WIDTH)?;
        Ok(Self {
            rows,
            index: Mutex::new(index),
        })
    }

    /// Reads what [`KeyIndex::encode`] wrote and builds the graph again.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let (head_dim, keys) = Rows::decode(bytes, Kind::FaissHnsw, origin)?;
        let mut index = Self::new(head_dim, origin)?;
        index.append(&keys)?;
        Ok(index)
    }
}

fn set(index: &IndexImpl, name: &str, value: f64) -> Result<(), IndexError> {
    let space = ParameterSpace::new().map_err(failed)?;
    space.set_index_parameter(index, name, value).map_err(failed)
}

impl KeyIndex for FaissHnsw {
    fn name(&self) -> &'static str {
        "hnsw-faiss"
    }

    fn keys(&self) -> usize {
        self.rows.len()
    }

    /// Rows as f32, and room for the edges of the lowest layer, which nearly all edges are of.
    fn bytes(&self) -> usize {
        self.rows.positions.len() * (self.rows.head_dim * 4 + 2 * NEIGHBOURS * 4)
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        let rows = self.rows.take(keys)?;
        let index = self.index.get_mut();
        let mut parts = rows.chunks(ADDED_AT_ONCE * self.rows.head_dim);
        parts.try_for_each(|part| index.add(part).map_err(failed))
    }

    /// The effort chooses the width of the search: an eighth of the keys it allows, all at an effort of 1. It finds no more keys
    /// than it is wide, and of those it leaves out the excluded.
    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.rows.head_dim, self.rows.len())?;
        let width = match budget(search, self.rows.len()) {
            all if all == self.rows.len() => all,
            some => (some / SCORED_PER_WIDTH).max(1),
        };
        let width = width.min(self.rows.positions.len());
        if width == 0 {
            return Ok(hits(vec![Best::new(search.k); heads], Cost::default()));
        }
        let found = {
            let mut index = self.index.lock();
            set(&index, "efSearch", width as f64)?;
            index.search(&signed(search), width).map_err(failed)?
        };
        Ok(hits(self.rows.rank(search, &found.labels, width), Cost::default()))
    }

    fn counts(&self) -> bool {
        false
    }

    fn encode(&self) -> Vec<u8> {
        self.rows.encode(Kind::FaissHnsw)
    }
}
