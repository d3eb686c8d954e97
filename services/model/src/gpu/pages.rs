//! Pages on the device, and their ways to and from the host.

use std::{collections::HashMap, ops::Range, sync::Arc};

use kvasir_block::LayerBlockLayout;
use kvasir_cuda::{Buffer, Gpu, GpuError, Inbound, Outbound, Sent};

use super::pool_error;
use crate::{PageId, PoolError};

/// Layer blocks that may be on their way to the device.
const INBOUND_PLACES: usize = 64;

/// Page-locked memory for what a step sends to the host; steps that would need more read pages one by one.
const OUTBOUND_BYTES_MAX: usize = 1 << 30;

/// All pages of a pool on a GPU.
pub(crate) struct DevicePages {
    gpu: Gpu,
    layout: LayerBlockLayout,
    pages: usize,
    layers: Vec<Buffer<u16>>,
    inbound: Inbound,
    outbound: Option<Outbound>,
    /// Places of the pages that the present step sends, in what is sent of each layer.
    places: HashMap<PageId, usize>,
    /// What was sent of each layer in the present step.
    sent: Vec<Option<Sent>>,
    /// The same for all that is recorded over these pages.
    identity: Arc<()>,
}

impl DevicePages {
    pub(super) fn new(gpu: &Gpu, layout: LayerBlockLayout, layers: usize, pages: usize) -> Result<Self, PoolError> {
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
            gpu: gpu.clone(),
            layout,
            pages,
            layers: memory.collect::<Result<_, _>>().map_err(pool_error)?,
            inbound: Inbound::new(gpu, INBOUND_PLACES, layout.bytes()).map_err(pool_error)?,
            outbound: None,
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

    /// A page's bytes: those that were sent, or now, behind all work that was given so far.
    pub(crate) fn read(&self, layer: usize, page: PageId) -> Result<Vec<u8>, PoolError> {
        let bytes = self.layout.bytes();
        if let (Some(&place), Some(sent), Some(outbound)) = (self.places.get(&page), &self.sent[layer], &self.outbound)
        {
            let all = outbound.read(sent).map_err(pool_error)?;
            return Ok(all[place * bytes..][..bytes].to_vec());
        }
        let elements = self.range(page);
        let words = self.layers[layer]
            .download_range(elements.start / 2..elements.end / 2)
            .map_err(pool_error)?;
        Ok(words.into_iter().flat_map(u16::to_le_bytes).collect())
    }

    /// Prepares to send `pages` of every layer; whether there is anything to send.
    pub(super) fn begin_sending(&mut self, pages: &[PageId]) -> Result<bool, GpuError> {
        self.end_sending()?;
        let needed = pages.len() * self.layout.bytes() * self.layers.len();
        if pages.is_empty() || needed > OUTBOUND_BYTES_MAX {
            return Ok(false);
        }
        if self.outbound.as_ref().is_none_or(|outbound| outbound.room() < needed) {
            self.outbound = Some(Outbound::new(&self.gpu, needed.next_power_of_two())?);
        }
        self.places = pages.iter().enumerate().map(|(place, page)| (*page, place)).collect();
        Ok(true)
    }

    /// Sends the pages of a layer once everything given so far has run.
    pub(super) fn send(&mut self, layer: usize) -> Result<(), GpuError> {
        let mut order: Vec<(usize, PageId)> = self.places.iter().map(|(page, place)| (*place, *page)).collect();
        order.sort_unstable();
        let ranges: Vec<Range<usize>> = order.into_iter().map(|(_, page)| self.range(page)).collect();
        if let Some(outbound) = &mut self.outbound {
            self.sent[layer] = Some(outbound.send(&self.layers[layer], &ranges)?);
        }
        Ok(())
    }

    /// Whether what was sent of a layer is there.
    pub(super) fn is_there(&self, layer: usize) -> bool {
        match (&self.outbound, &self.sent[layer]) {
            (Some(outbound), Some(sent)) => outbound.is_there(sent),
            _ => false,
        }
    }

    /// Forgets what was sent.
    pub(super) fn end_sending(&mut self) -> Result<(), GpuError> {
        self.places.clear();
        self.sent.iter_mut().for_each(|sent| *sent = None);
        self.outbound.as_mut().map_or(Ok(()), Outbound::clear)
    }

    /// Bytes of a page in a layer.
    fn range(&self, page: PageId) -> Range<usize> {
        let bytes = self.layout.bytes();
        page.0 as usize * bytes..(page.0 as usize + 1) * bytes
    }
}
