//! The kernels' tiles. What a query sees is `kvasir_sparse`'s to say: a [`Mask`](crate::Mask) over row blocks of [`ROWS`].

pub use kvasir_sparse::TILE;

/// Query rows that share a list of tiles: the height of the kernel's tile.
pub const ROWS: usize = 128;
