//! Compressed clusters.

use std::io::{self, Read};

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use ruzstd::decoding::StreamingDecoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::corrupt;
use super::header::Compression;

/// Makes a cluster of what was compressed; there may be other bytes behind it.
pub(super) fn decompress(kind: Compression, bytes: &[u8], cluster_size: usize) -> io::Result<Vec<u8>> {
    let mut cluster = vec![0; cluster_size];
    let whole = match kind {
        Compression::Zlib => {
            let mut inflater = Decompress::new(false);
            let status = inflater.decompress(bytes, &mut cluster, FlushDecompress::Finish);
            status.is_ok() && inflater.total_out() == cluster_size as u64
        }
        Compression::Zstd => {
            StreamingDecoder::new(bytes).is_ok_and(|mut decoder| decoder.read_exact(&mut cluster).is_ok())
        }
    };
    if whole { Ok(cluster) } else { Err(corrupt("a compressed cluster is damaged")) }
}

/// Compresses a cluster; `None` if that makes it no smaller.
pub(super) fn compress(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    match kind {
        Compression::Zlib => {
            let mut bytes = vec![0; cluster.len() - 1];
            let mut deflater = Compress::new(flate2::Compression::default(), false);
            let status = deflater.compress(cluster, &mut bytes, FlushCompress::Finish).ok()?;
            bytes.truncate(deflater.total_out() as usize);
            (status == Status::StreamEnd).then_some(bytes)
        }
        Compression::Zstd => {
            let bytes = compress_to_vec(cluster, CompressionLevel::Fastest);
            (bytes.len() < cluster.len()).then_some(bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_comes_back() {
        for kind in [Compression::Zlib, Compression::Zstd] {
            let cluster: Vec<u8> = (0..65536u32).map(|n| (n / 100) as u8).collect();
            let mut bytes = compress(kind, &cluster).unwrap();
            bytes.extend([0xee; 300]);
            assert_eq!(decompress(kind, &bytes, cluster.len()).unwrap(), cluster);
            assert!(decompress(kind, &bytes[..40], cluster.len()).is_err());
            let mut noise = vec![0; 65536];
            ruse_random::Random::new(1).fill(&mut noise);
            assert_eq!(compress(kind, &noise), None);
        }
    }
}
