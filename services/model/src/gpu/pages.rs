//! Pages on the device, and their ways to and from the host.

use std::{collections::HashMap, ops::Range, sync::Arc};

use bytes::Bytes;
use kvasir_block::LayerBlockLayout;
use kvasir_cuda::{Buffer, Gpu, GpuError, Inbound, Outbound, Sent};

use super::pool_error;
use crate::{PageId, PoolError};

/// Layer blocks that may be on their way to the device.
const INBOUND_PLACES: usize = 64;

/// All pages of a pool on a GPU.
pub(crate) struct DevicePages {
    layout: LayerBlockLayout,
    pages: usize,
    layers: Vec<Buffer<u16>>,
    inbound: Inbound,
    outbound: Outbound,
    /// Places of the pages that the present step is to send, in what is sent of each layer; `None` for which there is no room.
    places: HashMap<PageId, Option<usize>>,
    /// What was sent of each layer in the present step.
    sent: Vec<Option<Sent>>,
    /// The same for all that is recorded over these pages.
    identity: Arc<()>,
}

impl DevicePages {
    /// With `landing_bytes` of page-locked memory for what is sent to the host and still read there.
    pub(super) fn new(
        gpu: &Gpu,
        layout: LayerBlockLayout,
        layers: usize,
        pages: usize,
        landing_bytes: usize,
    ) -> Result<Self, PoolError> {
        let size = PoolError::Size {
            pages,
            layers,
            page_bytes: layout.bytes(),
        };
        let elements = layout.elements().checked_mul(pages).filter(|elements| *elements > 0);
        let (Some(elements), Ok(_)) = (elements, u32::try_from(pages)) else {
            return Err(size);
        };
        let memory = (0..layers).map(|_| gpu.zeros(elements));
        let out = Self {
            layout,
            pages,
            layers: memory.collect::<Result<_, _>>().map_err(pool_error)?,
            inbound: Inbound::new(gpu, INBOUND_PLACES, layout.bytes()).map_err(pool_error)?,
            outbound: Outbound::new(gpu, landing_bytes).map_err(pool_error)?,
            places: HashMap::new(),
            sent: (0..layers).map(|_| None).collect(),
            identity: Arc::default(),
        };
        // The zeros are written by the main stream, and payloads come by another.
        gpu.synchronize().map_err(pool_error)?;
        Ok(out)
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
    }

    pub(super) fn layer(&mut self, layer: usize) -> &mut Buffer<u16> {
        &mut self.layers[layer]
    }

    pub(super) fn identity(&self) -> &Arc<()> {
        &self.identity
    }

    /// Copies a payload into a page, beside whatever computes; the length was checked.
    pub(crate) fn fill(&mut self, layer: usize, page: PageId, payload: &[u8]) -> Result<(), PoolError> {
        let at = page.0 as usize * self.layout.bytes();
        self.inbound
            .send(&mut self.layers[layer], at, payload)
            .map_err(pool_error)
    }

    /// Makes what computes next wait for everything that was filled.
    pub(super) fn join(&mut self) -> Result<(), GpuError> {
        self.inbound.join()
    }

    /// A page's bytes: where they landed if they were sent, or a copy made now, behind all work that was given so far.
    pub(crate) fn read(&self, layer: usize, page: PageId) -> Result<Bytes, PoolError> {
        if let Some(place) = self.places.get(&page) {
            let (Some(place), Some(sent)) = (place, &self.sent[layer]) else {
                return Err(PoolError::NoRoom);
            };
            return sent.page(*place).map(Bytes::from_owner).map_err(pool_error);
        }
        let elements = self.range(page);
        let words = self.layers[layer]
            .download_range(elements.start / 2..elements.end / 2)
            .map_err(pool_error)?;
        let mut bytes = vec![0; 2 * words.len()];
        for (bytes, word) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        Ok(bytes.into())
    }

    /// Prepares to send `pages` of every layer, the first of them where there is no room for all; whether there is anything to send.
    pub(super) fn begin_sending(&mut self, pages: &[PageId]) -> Result<bool, GpuError> {
        self.end_sending();
        if pages.is_empty() {
            return Ok(false);
        }
        let numbers: Vec<u32> = pages.iter().map(|page| page.0).collect();
        let count = self.outbound.begin(&numbers, self.layout.bytes())?;
        let places = pages.iter().enumerate();
        self.places = places
            .map(|(place, page)| (*page, (place < count).then_some(place)))
            .collect();
        Ok(count > 0)
    }

    /// Sends the pages of a layer, as everything given so far leaves them; whether there was room for them.
    pub(super) fn send(&mut self, layer: usize) -> Result<bool, GpuError> {
        self.sent[layer] = self.outbound.send(&self.layers[layer])?;
        Ok(self.sent[layer].is_some())
    }

    /// Whether nothing of a layer is still on its way.
    pub(super) fn is_there(&self, layer: usize) -> bool {
        self.sent[layer].as_ref().is_none_or(Sent::is_there)
    }

    /// Forgets what was sent of a layer that everyone was told of: who reads it keeps it, and the room serves later layers.
    pub(super) fn forget(&mut self, layer: usize) {
        self.sent[layer] = None;
    }

    /// Forgets what was sent; who reads it keeps it.
    pub(super) fn end_sending(&mut self) {
        self.places.clear();
        self.sent.iter_mut().for_each(|sent| *sent = None);
    }

    /// Bytes of a page in a layer.
    fn range(&self, page: PageId) -> Range<usize> {
        let bytes = self.layout.bytes();
        page.0 as usize * bytes..(page.0 as usize + 1) * bytes
    }
}
