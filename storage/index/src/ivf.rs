//! Inverted lists, the plain baseline: Euclidean k-means over the keys, lists probed by the product with their centroid.
//!
//! This is what a vector database does with keys when it is not told about queries (the IVF of RetrievalAttention's
//! comparison). Clustered once over all keys; appended keys join the list of the nearest centroid, so recall drifts when they
//! are unlike the first ones.

use half::f16;
use kvasir_simd::Pool;

use crate::{
    Cost, Hits, IndexError, KeyIndex, KeyRows, Search,
    cluster::{Lists, Metric, finite_rows, k_means, mean_row},
    file::{self, Fields, Kind, Origin},
    search::{Best, budget, check, check_rows, hits, is_finite, ranked, scan_lists},
};

const VERSION: u16 = 1;
/// Lloyd's iterations; faiss trains with 10 to 25.
const ITERATIONS: usize = 10;

/// Lists of keys around centroids.
#[derive(Clone, Debug, PartialEq)]
pub struct Ivf {
    origin: Origin,
    head_dim: usize,
    keys: usize,
    /// `[lists, head_dim]`
    centroids: Vec<f16>,
    /// Half the squared length of each centroid.
    offsets: Vec<f32>,
    lists: Vec<Vec<u32>>,
}

impl Ivf {
    /// Clusters `keys` into `lists`; `None` takes 4 times the square root of their number, the least that faiss advises.
    ///
    /// # Errors
    /// [`IndexError::Invalid`] if `lists` is 0 or there are more keys than 32 bits count.
    pub fn build(keys: KeyRows<'_>, lists: Option<usize>, origin: Origin, pool: &Pool) -> Result<Self, IndexError> {
        check_rows(&[], keys.head_dim(), keys.len())?;
        if lists == Some(0) {
            return Err(IndexError::Invalid {
                argument: "lists",
                problem: "0 lists hold nothing; ask for at least 1".to_owned(),
            });
        }
        let head_dim = keys.head_dim();
        let (positions, rows) = finite_rows(keys);
        let count = lists
            .unwrap_or_else(|| (4.0 * (positions.len() as f64).sqrt()) as usize)
            .min(positions.len());
        let mut index = Self {
            origin,
            head_dim,
            keys: keys.len(),
            centroids: Vec::new(),
            offsets: Vec::new(),
            lists: Vec::new(),
        };
        if count > 0 {
            let assigned = k_means(&rows, head_dim, count, ITERATIONS, Metric::Euclid, pool);
            let lists = Lists::of(&assigned, count, &positions);
            index.lists = (0..lists.len()).map(|list| lists.get(list).to_vec()).collect();
            index.centroids = index
                .lists
                .iter()
                .flat_map(|list| mean_row(list.iter().map(|position| keys.row(*position as usize)), head_dim))
                .collect();
            index.offsets = offsets(&index.centroids, head_dim);
        }
        Ok(index)
    }

    /// Reads what [`KeyIndex::encode`] wrote.
    ///
    /// # Errors
    /// [`IndexError::Unusable`]: damaged, another kind or version, or built from something else than `origin`.
    pub fn decode(bytes: &[u8], origin: Origin) -> Result<Self, IndexError> {
        let frame = file::open(bytes, Kind::Ivf, VERSION, origin)?;
        let mut fields = Fields::new(frame.payload);
        let (count, members) = (fields.u32()? as usize, fields.u32()? as usize);
        let lists = Lists {
            starts: fields.u32s(count.saturating_add(1))?,
            members: fields.u32s(members)?,
        };
        let centroids = fields.halves(count.saturating_mul(frame.head_dim))?;
        fields.finish()?;
        if !lists.is_valid(frame.keys) || !is_finite(&centroids) {
            return Err(IndexError::Unusable("its lists cannot be".to_owned()));
        }
        Ok(Self {
            origin,
            head_dim: frame.head_dim,
            keys: frame.keys,
            offsets: offsets(&centroids, frame.head_dim),
            centroids,
            lists: (0..count).map(|list| lists.get(list).to_vec()).collect(),
        })
    }
}

impl KeyIndex for Ivf {
    fn name(&self) -> &'static str {
        "ivf"
    }

    fn keys(&self) -> usize {
        self.keys
    }

    fn bytes(&self) -> usize {
        let members = |list: &Vec<u32>| size_of_val(list) + size_of_val(list.as_slice());
        size_of_val(self.centroids.as_slice())
            + size_of_val(self.offsets.as_slice())
            + self.lists.iter().map(members).sum::<usize>()
    }

    fn append(&mut self, keys: &[f16]) -> Result<(), IndexError> {
        check_rows(keys, self.head_dim, self.keys)?;
        let mut products = vec![0.0; self.lists.len()];
        let mut q = vec![0.0; self.head_dim];
        for key in keys.chunks_exact(self.head_dim) {
            let position = self.keys as u32;
            self.keys += 1;
            if !is_finite(key) {
                continue;
            }
            if self.lists.is_empty() {
                self.centroids = key.to_vec();
                self.offsets = offsets(&self.centroids, self.head_dim);
                self.lists.push(Vec::new());
                products.push(0.0);
            }
            kvasir_simd::to_f32(key, &mut q);
            kvasir_simd::scores(
                &q,
                &self.centroids,
                self.head_dim,
                std::f32::consts::LN_2,
                &mut products,
            );
            products
                .iter_mut()
                .zip(&self.offsets)
                .for_each(|(product, offset)| *product -= offset);
            let nearest = ranked(&products)[0];
            self.lists[nearest as usize].push(position);
        }
        Ok(())
    }

    fn search(&self, search: &Search<'_>) -> Result<Hits, IndexError> {
        let heads = check(search, self.head_dim, self.keys)?;
        let lists = self.lists.len();
        let mut products = vec![0.0; heads * lists];
        kvasir_simd::scores(search.q, &self.centroids, self.head_dim, search.scale, &mut products);
        let orders: Vec<_> = (0..heads)
            .map(|head| ranked(&products[head * lists..][..lists]))
            .collect();
        let mut cost = Cost {
            keys_scored: 0,
            bytes_read: size_of_val(self.centroids.as_slice()) as u64,
        };
        let mut best = vec![Best::new(search.k); heads];
        let members = |list: u32| self.lists[list as usize].iter().copied();
        scan_lists(
            search,
            &orders,
            budget(search, self.keys),
            size_of::<u32>() as u64,
            members,
            &mut cost,
            &mut best,
        );
        Ok(hits(best, cost))
    }

    fn encode(&self) -> Vec<u8> {
        let mut lists = Lists {
            starts: vec![0],
            members: Vec::new(),
        };
        self.lists.iter().for_each(|list| lists.push(list));
        let mut payload = Vec::with_capacity(self.bytes() + 16);
        file::put_u32s(&mut payload, &[lists.len() as u32, lists.members.len() as u32]);
        file::put_u32s(&mut payload, &lists.starts);
        file::put_u32s(&mut payload, &lists.members);
        file::put_halves(&mut payload, &self.centroids);
        file::seal(Kind::Ivf, VERSION, self.head_dim, self.keys, self.origin, &payload)
    }
}

fn offsets(centroids: &[f16], head_dim: usize) -> Vec<f32> {
    centroids
        .chunks_exact(head_dim)
        .map(|centroid| 0.5 * centroid.iter().map(|x| x.to_f32().powi(2)).sum::<f32>())
        .collect()
}
