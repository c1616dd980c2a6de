//! Compressed clusters: inflating one, in pure code.
//!
//! A descriptor gives an upper bound of the data's length, in sectors; what follows the end of the
//! stream belongs to a neighbour. The other end is exact: a stream gives one cluster, neither less
//! nor more. qcow2 specification, "Compressed Clusters Descriptor".

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::header::CompressionType;

/// Why compressed data is not a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflateError {
    /// The stream contradicts its format.
    #[error("the data is damaged")]
    Damaged,
    /// The stream ends too early, or goes on behind the data that the descriptor allows.
    #[error("it gives less than a cluster")]
    Short,
    /// The stream goes on when the cluster is full.
    #[error("it gives more than a cluster")]
    Long,
}

/// Inflates `data` into `cluster`, all of it.
///
/// # Errors
/// Anything that does not give exactly one cluster; what is in `cluster` then means nothing.
pub(crate) fn inflate(
    kind: CompressionType,
    data: &[u8],
    cluster: &mut [u8],
) -> Result<(), InflateError> {
    match kind {
        CompressionType::Zlib => inflate_deflate(data, cluster),
        CompressionType::Zstd => inflate_zstd(data, cluster),
    }
}

fn inflate_deflate(data: &[u8], cluster: &mut [u8]) -> Result<(), InflateError> {
    let mut stream = Decompress::new(false);
    let status = stream
        .decompress(data, cluster, FlushDecompress::Finish)
        .map_err(|_| InflateError::Damaged)?;
    let (read, written) = (stream.total_in(), stream.total_out());
    if written < cluster.len() as u64 {
        return Err(InflateError::Short);
    }
    if status == Status::StreamEnd {
        return Ok(());
    }
    // Full, and the end of the stream not seen: it may be all that is left, or more data.
    let rest = usize::try_from(read)
        .ok()
        .and_then(|read| data.get(read..))
        .unwrap_or_default();
    let mut one_more = [0; 1];
    match stream.decompress(rest, &mut one_more, FlushDecompress::Finish) {
        Ok(_) if stream.total_out() > written => Err(InflateError::Long),
        // Cut off behind the last byte of the cluster: nothing of it is missing.
        Ok(_) => Ok(()),
        Err(_) => Err(InflateError::Damaged),
    }
}

fn inflate_zstd(data: &[u8], cluster: &mut [u8]) -> Result<(), InflateError> {
    let mut decoder = Decoder::new().map_err(|_| InflateError::Damaged)?;
    let mut input = InBuffer::around(data);
    let len = cluster.len();
    let mut output = OutBuffer::around(cluster);
    loop {
        let (read, written) = (input.pos(), output.pos());
        let hint = decoder
            .run(&mut input, &mut output)
            .map_err(|_| InflateError::Damaged)?;
        if output.pos() == len {
            // Zero: the frame is complete.
            return if hint == 0 {
                Ok(())
            } else {
                Err(InflateError::Long)
            };
        }
        if (input.pos(), output.pos()) == (read, written) {
            return Err(InflateError::Short);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    fn deflate(data: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(data.len() * 2 + 64);
        Compress::new(Compression::default(), false)
            .compress_vec(data, &mut out, FlushCompress::Finish)
            .unwrap();
        out
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..=u8::MAX)
            .flat_map(|byte| [byte; 7])
            .cycle()
            .take(len)
            .collect()
    }

    /// Exactly one cluster, whatever follows the stream; less, more and noise are errors.
    #[test]
    fn one_cluster_neither_less_nor_more() {
        let whole = pattern(4096);
        for (kind, pack) in [
            (CompressionType::Zlib, deflate as fn(&[u8]) -> Vec<u8>),
            (CompressionType::Zstd, |data: &[u8]| {
                zstd::bulk::compress(data, 3).unwrap()
            }),
        ] {
            let mut cluster = vec![0; 4096];
            let mut data = pack(&whole);
            assert_eq!(inflate(kind, &data, &mut cluster), Ok(()), "{kind:?}");
            assert_eq!(cluster, whole);
            data.extend([0xa5; 300]);
            assert_eq!(
                inflate(kind, &data, &mut cluster),
                Ok(()),
                "{kind:?}: a neighbour follows"
            );
            for (name, data, want) in [
                ("one byte less", pack(&whole[..4095]), InflateError::Short),
                ("one byte more", pack(&pattern(4097)), InflateError::Long),
                ("a bomb", pack(&vec![0; 1 << 20]), InflateError::Long),
                ("nothing", Vec::new(), InflateError::Short),
                ("cut off", pack(&whole)[..20].to_vec(), InflateError::Short),
                ("noise", vec![0xff; 512], InflateError::Damaged),
            ] {
                assert_eq!(
                    inflate(kind, &data, &mut cluster),
                    Err(want),
                    "{kind:?}: {name}"
                );
            }
        }
    }
}
