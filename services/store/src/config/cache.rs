//! What the cache and its tiers are told.

use std::collections::HashMap;

use anyhow::Context;
use kvasir_block::Tenant;
use kvasir_cache::{AbsentDisk, CacheConfig, Credentials, HugePages, ObjectConfig, StoreId};
use kvasir_runtime::units::ByteSize;

use super::{DiskPlace, StoreConfig};

impl StoreConfig {
    /// The part of it that the cache wants.
    pub(crate) fn cache(&self) -> CacheConfig {
        let default = self.tenant_host_bytes_max_default;
        CacheConfig {
            host_bytes_max: self.host_bytes_max.as_u64(),
            host_policy: self.host_policy,
            huge_pages: if self.huge_pages {
                HugePages::Auto
            } else {
                HugePages::Off
            },
            host_ready_bytes: self.host_ready_bytes.as_u64(),
            tenant_host_bytes_max: self.tenant_budgets(),
            tenant_host_bytes_max_default: (default > ByteSize::bytes(0)).then(|| default.as_u64()),
            disk_bytes_max: self.disk_bytes_max.as_u64(),
            segment_bytes: self.segment_bytes.as_u64(),
            flush_queue_bytes_max: self.flush_queue_bytes_max.as_u64(),
            disk_reads_max: self.disk_reads_max,
            disk_reads_waiting_max: self.disk_reads_waiting_max,
            disk_admission: self.disk_admission.into(),
            promote_after_reads: self.promote_after_reads,
            reuse_entries: self.reuse_entries,
            prefetch_layers: self.prefetch_layers,
            prefetch_bytes_max: self.prefetch_bytes_max.as_u64(),
            disks: self.disks.iter().map(DiskPlace::path).collect(),
            disk_absent: if self.disk_absent_ok {
                AbsentDisk::LeaveOut
            } else {
                AbsentDisk::Refuse
            },
            disk_free_bytes_min: self.disk_free_bytes_min.as_u64(),
            scrub_bytes_per_second: self.scrub_bytes_per_second.as_u64(),
            lease_max: self.lease_max.get(),
            leases_max: self.leases_max,
            contexts_max: self.contexts_max,
            context_blocks_max: self.hashes_max,
            context_bytes_max: self.context_bytes_max.as_u64(),
            basis_bytes_max: self.basis_bytes_max.as_u64(),
            sketch_bytes_max: self.sketch_bytes_max.as_u64(),
            sketch_queue_max: self.sketch_queue_max,
            cluster_queue_max: self.cluster_queue_max,
            query_bytes_max: self.query_bytes_max.as_u64(),
            index_bytes_max: self.index_bytes_max.as_u64(),
            build_queue_max: self.build_queue_max,
            build_threads: self.build_threads,
            namespaces_max: self.namespaces_max,
            event_queue_max: self.event_queue_max,
            subscribers_max: self.subscribers_max,
            ..CacheConfig::in_dir(&self.data_dir)
        }
    }

    /// Budgets of tenants that are named.
    fn tenant_budgets(&self) -> HashMap<Tenant, u64> {
        let named = self.tenant_host_bytes_max.iter();
        named
            .filter_map(|(name, bytes_max)| Some((Tenant::new(name.as_str())?, bytes_max.as_u64())))
            .collect()
    }

    /// The object tier, if one is configured. `store` names this store among those that share the bucket.
    ///
    /// # Errors
    /// When the credentials cannot be read.
    pub(crate) fn object(&self, store: StoreId) -> anyhow::Result<Option<ObjectConfig>> {
        if self.object_url.is_empty() {
            return Ok(None);
        }
        let mut object = ObjectConfig::new(&self.object_url, store);
        object.endpoint = (!self.object_endpoint.is_empty()).then(|| self.object_endpoint.clone());
        object.path_style = object.endpoint.is_some();
        object.region.clone_from(&self.object_region);
        object.allow_http = self.object_allow_http;
        object.object_bytes = self.object_pack_bytes.as_u64();
        object.queue_bytes_max = object.queue_bytes_max.max(object.object_bytes.saturating_mul(2));
        object.open_age_max = self.object_pack_age_max.into();
        if !self.object_credentials_file.as_os_str().is_empty() {
            let path = self.object_credentials_file.display();
            let text = std::fs::read_to_string(&self.object_credentials_file)
                .with_context(|| format!("store.object_credentials_file: cannot read {path}"))?;
            let mut lines = text
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty())
                .map(str::to_owned);
            let (Some(id), Some(secret)) = (lines.next(), lines.next()) else {
                anyhow::bail!(
                    "store.object_credentials_file: {path} must have an access key id and its secret, a line each"
                );
            };
            let token = lines.next();
            object.credentials = Credentials::Key { id, secret, token };
        }
        Ok(Some(object))
    }
}
