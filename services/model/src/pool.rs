//! KV memory in pages.

use bytes::Bytes;
use half::{f16, vec::HalfBitsVecExt};
use kvasir_block::{Dtype, LayerBlockLayout};

use crate::gpu::DevicePages;

/// A page: room for one token block in every layer of a [`PagePool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// Pages 0 to `count`, for who has a pool to itself.
pub(crate) fn page_ids(count: usize) -> Vec<Option<PageId>> {
    (0..count).map(|page| u32::try_from(page).ok().map(PageId)).collect()
}

/// Why a pool or a page is not as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Pages hold f16.
    #[error("pages hold f16, and the layout asks for {0}: use a schema with dtype f16")]
    Dtype(Dtype),
    /// The pool would be empty, or larger than what can be had.
    #[error(
        "{pages} pages of {page_bytes} bytes in {layers} layers cannot be allocated: use from 1 page to what memory holds"
    )]
    Size {
        /// Pages asked for.
        pages: usize,
        /// Layers of each.
        layers: usize,
        /// Bytes of a page in a layer.
        page_bytes: usize,
    },
    /// There is no such page.
    #[error("layer {layer}, page {page} is beyond the pool's {layers} layers of {pages} pages")]
    NoPage {
        /// Layer asked for.
        layer: usize,
        /// Page asked for.
        page: u32,
        /// Layers there are.
        layers: usize,
        /// Pages there are.
        pages: usize,
    },
    /// The pool lies on a GPU, which has no room or failed.
    #[error("the pages on the GPU cannot be used: {0}")]
    Gpu(String),
    /// A page that a step was to send to the host ([`crate::StepHooks::wanted_pages`]) found no room there.
    #[error("the page was not sent: all page-locked memory holds what is still read (worker.gpu.pinned_bytes)")]
    NoRoom,
    /// A payload is exactly a page.
    #[error("a payload of {found} bytes does not fill a page of {expected}: it was made under another schema")]
    Length {
        /// Bytes of a page in a layer.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

/// KV memory of a worker. A page of a layer has exactly the bytes of a layer block's payload. It knows no owners:
/// who holds which page is the worker's business. Pages begin as zeros, and memory is taken as they are first written.
pub struct PagePool {
    layout: LayerBlockLayout,
    pages: usize,
    memory: Memory,
}

/// Where the pages lie: per layer all of them, end to end.
enum Memory {
    Host(Vec<Vec<f16>>),
    Gpu(Box<DevicePages>),
}

impl PagePool {
    /// A pool of `pages` pages in `layers` layers.
    ///
    /// # Errors
    /// [`PoolError`] if the layout is not f16, there would be no page, or the size cannot be had.
    pub fn new(layout: LayerBlockLayout, layers: usize, pages: usize) -> Result<Self, PoolError> {
        if layout.dtype != Dtype::F16 {
            return Err(PoolError::Dtype(layout.dtype));
        }
        let error = PoolError::Size {
            pages,
            layers,
            page_bytes: layout.bytes(),
        };
        let elements = layout.elements().checked_mul(pages).filter(|elements| *elements > 0);
        let bytes = elements.and_then(|elements| elements.checked_mul(2 * layers));
        let (Some(elements), Some(1..)) = (elements, bytes.filter(|bytes| isize::try_from(*bytes).is_ok())) else {
            return Err(error);
        };
        if u32::try_from(pages).is_err() {
            return Err(error);
        }
        let layers = (0..layers).map(|_| {
            // Asked first, because a zeroed vector that cannot be had ends the process.
            Vec::<u16>::new()
                .try_reserve_exact(elements)
                .map_err(|_| error.clone())?;
            Ok(vec![0_u16; elements].reinterpret_into::<f16>())
        });
        Ok(Self {
            layout,
            pages,
            memory: Memory::Host(layers.collect::<Result<_, _>>()?),
        })
    }

    /// The same on a GPU.
    pub(crate) fn on_gpu(layout: LayerBlockLayout, pages: DevicePages) -> Self {
        Self {
            layout,
            pages: pages.pages(),
            memory: Memory::Gpu(Box::new(pages)),
        }
    }

    /// The pages of a pool that lies on a GPU.
    pub(crate) fn device_mut(&mut self) -> Option<&mut DevicePages> {
        match &mut self.memory {
            Memory::Host(_) => None,
            Memory::Gpu(pages) => Some(pages),
        }
    }

    /// Pages there are; ids run from 0.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Layers of each page.
    pub fn layers(&self) -> usize {
        match &self.memory {
            Memory::Host(layers) => layers.len(),
            Memory::Gpu(pages) => pages.layers(),
        }
    }

    /// Where rows lie inside a page of a layer.
    pub fn layout(&self) -> LayerBlockLayout {
        self.layout
    }

    /// Memory of the whole pool.
    pub fn bytes(&self) -> usize {
        self.layout.bytes() * self.pages * self.layers()
    }

    /// All elements of a page in one layer, in the payload's layout.
    ///
    /// # Panics
    /// If there is no such layer or page, or the pool lies on a GPU: there [`PagePool::page_bytes`] is the way.
    pub fn page(&self, layer: usize, page: PageId) -> &[f16] {
        let elements = self.layout.elements();
        match &self.memory {
            Memory::Host(layers) => &layers[layer][page.0 as usize * elements..][..elements],
            Memory::Gpu(_) => panic!("pages on a GPU cannot be borrowed"),
        }
    }

    /// The same, to write.
    ///
    /// # Panics
    /// As [`PagePool::page`].
    pub fn page_mut(&mut self, layer: usize, page: PageId) -> &mut [f16] {
        let elements = self.layout.elements();
        match &mut self.memory {
            Memory::Host(layers) => &mut layers[layer][page.0 as usize * elements..][..elements],
            Memory::Gpu(_) => panic!("pages on a GPU cannot be borrowed"),
        }
    }

    /// The same as little-endian bytes: a layer block's payload, apart from the page, which may be written again while the
    /// payload travels. A copy; on a GPU, of wanted pages ([`crate::StepHooks::wanted_pages`]), the memory itself in which they landed.
    ///
    /// # Errors
    /// If the pool lies on a GPU: [`PoolError::NoRoom`] for a wanted page that was not sent, [`PoolError::Gpu`] if it failed.
    ///
    /// # Panics
    /// If there is no such layer or page.
    pub fn page_bytes(&self, layer: usize, page: PageId) -> Result<Bytes, PoolError> {
        if let Memory::Gpu(pages) = &self.memory {
            return pages.read(layer, page);
        }
        let mut bytes = vec![0; self.layout.bytes()];
        for (bytes, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(self.page(layer, page)) {
            *bytes = value.to_le_bytes();
        }
        Ok(bytes.into())
    }

    /// Fills a page of a layer from a payload.
    ///
    /// # Errors
    /// [`PoolError`] if there is no such page or the payload is not exactly a page.
    pub fn fill(&mut self, layer: usize, page: PageId, payload: &[u8]) -> Result<(), PoolError> {
        if layer >= self.layers() || page.0 as usize >= self.pages {
            let (layers, pages) = (self.layers(), self.pages);
            return Err(PoolError::NoPage {
                layer,
                page: page.0,
                layers,
                pages,
            });
        }
        if payload.len() != self.layout.bytes() {
            return Err(PoolError::Length {
                expected: self.layout.bytes(),
                found: payload.len(),
            });
        }
        if let Memory::Gpu(pages) = &mut self.memory {
            return pages.fill(layer, page, payload);
        }
        for (value, bytes) in self.page_mut(layer, page).iter_mut().zip(payload.as_chunks::<2>().0) {
            *value = f16::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: LayerBlockLayout = LayerBlockLayout {
        kv_heads: 3,
        head_dim: 8,
        block_tokens: 4,
        dtype: Dtype::F16,
    };

    #[test]
    fn a_page_begins_as_zeros_and_keeps_a_payload_to_itself() {
        let mut pool = PagePool::new(LAYOUT, 2, 3).expect("a small pool");
        let payload: Vec<u8> = (0..LAYOUT.bytes()).map(|i| (i * 7) as u8).collect();
        pool.fill(1, PageId(1), &payload).expect("a payload of a page's size");
        for (layer, page) in (0..2).flat_map(|layer| (0..3).map(move |page| (layer, page))) {
            let expected = if (layer, page) == (1, 1) {
                payload.clone()
            } else {
                vec![0; LAYOUT.bytes()]
            };
            assert_eq!(
                pool.page_bytes(layer, PageId(page)),
                Ok(Bytes::from(expected)),
                "layer {layer}, page {page}"
            );
        }
        // The first key element of head 1 is where the layout says.
        let at = LAYOUT.keys(1).start;
        let first = f16::from_le_bytes([payload[2 * at], payload[2 * at + 1]]);
        assert_eq!(pool.page(1, PageId(1))[at].to_bits(), first.to_bits());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut pool = PagePool::new(LAYOUT, 2, 3).expect("a small pool");
        let page = vec![0; LAYOUT.bytes()];
        let table: [(usize, u32, &[u8], &str); 4] = [
            (2, 0, &page, "layer 2, page 0 is beyond the pool's 2 layers of 3 pages"),
            (0, 3, &page, "layer 0, page 3 is beyond"),
            (0, 0, &page[1..], "a payload of 383 bytes does not fill a page of 384"),
            (0, 0, &[], "a payload of 0 bytes"),
        ];
        for (layer, page, payload, expected) in table {
            let error = pool.fill(layer, PageId(page), payload).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        for (layers, pages) in [
            (1, 0),
            (0, 1),
            (1, usize::MAX),
            (usize::MAX / 2, 2),
            (64, 1 << 52),
            (1, 1 << 40),
        ] {
            assert!(
                matches!(PagePool::new(LAYOUT, layers, pages), Err(PoolError::Size { .. })),
                "{layers} x {pages}"
            );
        }
        let wide = LayerBlockLayout {
            dtype: Dtype::F32,
            ..LAYOUT
        };
        assert_eq!(PagePool::new(wide, 1, 1).err(), Some(PoolError::Dtype(Dtype::F32)));
    }
}
