//! Copies between device and host on streams of their own, beside the work of the main stream.

mod inbound;
mod outbound;

use std::sync::Arc;

use cudarc::driver::{CudaEvent, CudaStream, sys};

use crate::{Gpu, GpuError};

pub use self::{
    inbound::Inbound,
    outbound::{Landed, Outbound, Sent},
};

fn new_stream(gpu: &Gpu) -> Result<Arc<CudaStream>, GpuError> {
    gpu.shared.bind("opening a stream")?;
    gpu.shared
        .context()
        .new_stream()
        .map_err(GpuError::driver("opening a stream"))
}

fn event(stream: &CudaStream) -> Result<CudaEvent, GpuError> {
    stream
        .record_event(Some(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING))
        .map_err(GpuError::driver("recording an event"))
}

fn wait(stream: &CudaStream, event: &CudaEvent) -> Result<(), GpuError> {
    stream.wait(event).map_err(GpuError::driver("waiting for an event"))
}
