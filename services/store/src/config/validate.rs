//! What a type cannot check: addresses, and limits that must fit each other.

use std::collections::HashSet;

use kvasir_runtime::{address::loopback_or_allowed, units::ByteSize};

use super::StoreConfig;
use crate::grpc::TENANT_BYTES_MAX;

impl StoreConfig {
    /// Checks what a type cannot: addresses, and limits that must fit each other.
    ///
    /// # Errors
    /// Names the key and says what to do.
    pub fn validate(&self) -> anyhow::Result<()> {
        self.validate_addresses()?;
        self.validate_counts()?;
        self.validate_messages()?;
        self.validate_tenants()?;
        self.validate_disks()?;
        self.validate_object()
    }

    fn validate_addresses(&self) -> anyhow::Result<()> {
        let addresses = [
            ("store.listen", self.listen),
            ("store.admin_listen", self.admin_listen),
            ("store.bulk_listen", self.bulk_listen),
        ];
        for (key, address) in addresses {
            loopback_or_allowed(key, address, "store.allow_remote", self.allow_remote)?;
        }
        Ok(())
    }

    fn validate_counts(&self) -> anyhow::Result<()> {
        let lasts = |duration: kvasir_runtime::units::HumanDuration| usize::from(!duration.get().is_zero());
        let counts = [
            ("streams_max", self.streams_max),
            ("bulk_connections_max", self.bulk_connections_max),
            ("bulk_idle_timeout", lasts(self.bulk_idle_timeout)),
            ("bulk_stall_timeout", lasts(self.bulk_stall_timeout)),
            ("hashes_max", self.hashes_max),
            ("disk_reads_max", self.disk_reads_max),
            ("reuse_entries", self.reuse_entries),
            ("io_threads", self.io_threads),
            ("retrieval_threads", self.retrieval_threads),
            ("build_threads", self.build_threads),
            ("message_timeout", lasts(self.message_timeout)),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == 0) {
            anyhow::bail!("store.{key} is 0: it must be more");
        }
        let after = self.promote_after_reads;
        if !(1..=15).contains(&after) {
            anyhow::bail!("store.promote_after_reads = {after}: choose 1 to 15");
        }
        Ok(())
    }

    fn validate_messages(&self) -> anyhow::Result<()> {
        let largest = ByteSize::gib(1);
        if self.message_bytes_max < ByteSize::kib(64) || self.message_bytes_max > largest {
            anyhow::bail!(
                "store.message_bytes_max = {}: choose 64KiB to {largest}",
                self.message_bytes_max
            );
        }
        if self.put_bytes_max < self.message_bytes_max || self.put_bytes_max > ByteSize::gib(1024) {
            anyhow::bail!(
                "store.put_bytes_max = {}: must have room for one message, store.message_bytes_max = {}",
                self.put_bytes_max,
                self.message_bytes_max
            );
        }
        Ok(())
    }

    fn validate_tenants(&self) -> anyhow::Result<()> {
        let whole = self.host_bytes_max;
        for (tenant, bytes_max) in &self.tenant_host_bytes_max {
            if tenant.is_empty() || tenant.len() > TENANT_BYTES_MAX {
                anyhow::bail!(
                    "store.tenant_host_bytes_max names a tenant of {} bytes: names have 1 to {TENANT_BYTES_MAX}",
                    tenant.len()
                );
            }
            if *bytes_max > whole {
                anyhow::bail!(
                    "store.tenant_host_bytes_max.{tenant} = {bytes_max}: there are only store.host_bytes_max = {whole}"
                );
            }
        }
        let default = self.tenant_host_bytes_max_default;
        if default > whole {
            anyhow::bail!(
                "store.tenant_host_bytes_max_default = {default}: there are only store.host_bytes_max = {whole}"
            );
        }
        Ok(())
    }

    fn validate_disks(&self) -> anyhow::Result<()> {
        let mut seen = HashSet::new();
        for disk in &self.disks {
            let dir = disk.dir.display();
            if disk.dir.as_os_str().is_empty() {
                anyhow::bail!("store.disks has a disk without dir: name a folder that the store has for itself");
            }
            if !seen.insert(&disk.dir) {
                anyhow::bail!("store.disks names {dir} twice: each disk needs a folder of its own");
            }
            let two = self.segment_bytes.as_u64().saturating_mul(2);
            if disk.bytes_max.as_u64() < two {
                anyhow::bail!(
                    "store.disks: {dir} has bytes_max = {}: must have room for two segments, store.segment_bytes = {}",
                    disk.bytes_max,
                    self.segment_bytes
                );
            }
        }
        if self.disk_absent_ok && self.disks.len() < 2 {
            anyhow::bail!(
                "store.disk_absent_ok needs several store.disks: without its only disk the store cannot start"
            );
        }
        Ok(())
    }

    fn validate_object(&self) -> anyhow::Result<()> {
        if self.object_url.is_empty() {
            let credentials = self.object_credentials_file.as_os_str();
            let strays = [
                ("object_endpoint", !self.object_endpoint.is_empty()),
                ("object_credentials_file", !credentials.is_empty()),
            ];
            if let Some((key, _)) = strays.iter().find(|(_, is_set)| *is_set) {
                anyhow::bail!("store.{key} is set and store.object_url is not: say which bucket, or remove the key");
            }
            return Ok(());
        }
        let url = &self.object_url;
        if !url.starts_with("s3://") && !url.starts_with("file:///") {
            anyhow::bail!("store.object_url = \"{url}\": write s3://bucket/prefix or file:///folder");
        }
        if self.object_endpoint.starts_with("http://") && !self.object_allow_http {
            anyhow::bail!(
                "store.object_endpoint = \"{}\": blocks would cross the network in the clear; use https://, or set store.object_allow_http",
                self.object_endpoint
            );
        }
        Ok(())
    }
}
