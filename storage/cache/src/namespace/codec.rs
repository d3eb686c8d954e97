//! A namespace file: `KVNS`, version (u32), fields, CRC-32C of all before it. Little-endian; strings and digests are
//! length-prefixed (u32). The order of the fields is the order of [`encode`]; a new field is a new version.

use kvasir_block::{Checksum, Dtype, KvSchema, NamespaceId, RopeStyle, Tenant};

const MAGIC: &[u8; 4] = b"KVNS";
const VERSION: u32 = 1;

/// Why a file is not a namespace.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum DecodeError {
    #[error("it is not a namespace file")]
    Magic,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it has version {0}, this program reads {VERSION}")]
    Version(u32),
    #[error("its field {0} is missing or malformed")]
    Field(&'static str),
    #[error("there are bytes behind its last field")]
    Trailing,
}

pub(super) fn encode(tenant: &Tenant, schema: &KvSchema) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    let adapter = schema.adapter_sha256.map_or_else(Vec::new, |digest| digest.to_vec());
    for bytes in [
        tenant.as_str().as_bytes(),
        schema.model.as_bytes(),
        &schema.weights_sha256,
        &schema.tokenizer_sha256,
        &adapter,
        schema.dtype.name().as_bytes(),
        schema.attention.as_bytes(),
        schema.rope_style.name().as_bytes(),
        schema.rope_scaling.as_bytes(),
        schema.numerics.as_bytes(),
    ] {
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(bytes);
    }
    for number in [
        schema.layers,
        schema.kv_heads,
        schema.head_dim,
        schema.block_tokens,
        schema.rope_dims,
        schema.tp_rank,
        schema.tp_world,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&schema.rope_theta.to_bits().to_le_bytes());
    let checksum = Checksum::of(&out).to_u32();
    out.extend_from_slice(&checksum.to_le_bytes());
    out
}

/// The namespace in a file, under the id that its fields hash to, and its tenant.
pub(super) fn decode(bytes: &[u8]) -> Result<(NamespaceId, Tenant, KvSchema), DecodeError> {
    let (body, checksum) = bytes.split_last_chunk::<4>().ok_or(DecodeError::Magic)?;
    let mut reader = Reader { rest: body };
    if reader.array("magic").ok() != Some(*MAGIC) {
        return Err(DecodeError::Magic);
    }
    if !Checksum::from_u32(u32::from_le_bytes(*checksum)).verifies(body) {
        return Err(DecodeError::Checksum);
    }
    let version = u32::from_le_bytes(reader.array("version")?);
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    let tenant = Tenant::new(reader.text("tenant")?).ok_or(DecodeError::Field("tenant"))?;
    let model = reader.text("model")?;
    let weights_sha256 = reader
        .digest("weights_sha256")?
        .ok_or(DecodeError::Field("weights_sha256"))?;
    let tokenizer_sha256 = reader
        .digest("tokenizer_sha256")?
        .ok_or(DecodeError::Field("tokenizer_sha256"))?;
    let adapter_sha256 = reader.digest("adapter_sha256")?;
    let dtype = reader
        .text("dtype")?
        .parse::<Dtype>()
        .map_err(|_| DecodeError::Field("dtype"))?;
    let attention = reader.text("attention")?;
    let rope_style = RopeStyle::from_name(&reader.text("rope_style")?).ok_or(DecodeError::Field("rope_style"))?;
    let rope_scaling = reader.text("rope_scaling")?;
    let numerics = reader.text("numerics")?;
    let schema = KvSchema {
        model,
        weights_sha256,
        tokenizer_sha256,
        adapter_sha256,
        dtype,
        attention,
        rope_style,
        rope_scaling,
        numerics,
        layers: reader.number("layers")?,
        kv_heads: reader.number("kv_heads")?,
        head_dim: reader.number("head_dim")?,
        block_tokens: reader.number("block_tokens")?,
        rope_dims: reader.number("rope_dims")?,
        tp_rank: reader.number("tp_rank")?,
        tp_world: reader.number("tp_world")?,
        rope_theta: f32::from_bits(u32::from_le_bytes(reader.array("rope_theta")?)),
    };
    if !reader.rest.is_empty() {
        return Err(DecodeError::Trailing);
    }
    schema.validate().map_err(|error| DecodeError::Field(error.field))?;
    Ok((NamespaceId::new(&tenant, &schema), tenant, schema))
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Field(field))?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn bytes(&mut self, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let length = u32::from_le_bytes(self.array(field)?) as usize;
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(DecodeError::Field(field))?;
        self.rest = rest;
        Ok(bytes)
    }

    fn text(&mut self, field: &'static str) -> Result<String, DecodeError> {
        String::from_utf8(self.bytes(field)?.to_vec()).map_err(|_| DecodeError::Field(field))
    }

    /// 32 bytes, or none at all.
    fn digest(&mut self, field: &'static str) -> Result<Option<[u8; 32]>, DecodeError> {
        match self.bytes(field)? {
            [] => Ok(None),
            bytes => bytes.try_into().map(Some).map_err(|_| DecodeError::Field(field)),
        }
    }

    fn number(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_le_bytes)
    }
}
