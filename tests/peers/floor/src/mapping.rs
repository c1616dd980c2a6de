//! The whole mapping of an image and of those that it stands on, read once.
//!
//! Each entry is the host offset of a guest cluster; its lowest byte, free because host clusters
//! are aligned to at least 512 bytes, tells which file of the chain it lies in. What none of them
//! has is zero.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// qcow2 specification, "Header".
const MAGIC: u32 = 0x5146_49fb;
/// qcow2 specification, "L1 table entry" and "Standard Cluster Descriptor": bits 9 to 55 are the
/// offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 62, and bit 0: compressed, and reads as zeros. The images that are measured have neither.
const ODD: u64 = 1 << 62 | 1;

/// Guest offset to file and host offset, for every cluster.
pub struct Mapping {
    /// Bytes of the disk.
    pub disk: u64,
    /// The files of the chain, the top one first.
    pub files: Vec<PathBuf>,
    cluster_bits: u32,
    l2_tables: Vec<Option<Box<[u64]>>>,
}

impl Mapping {
    /// Reads the header and all tables of `path` and of its backing files.
    ///
    /// # Errors
    /// Not qcow2, cut short, layers of different shape, or a cluster that is compressed or all
    /// zeros.
    pub fn load(path: &Path) -> Result<Mapping, String> {
        let mut mapping: Option<Mapping> = None;
        let mut next = Some(path.to_path_buf());
        while let Some(path) = next {
            let layer = Layer::load(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            next = layer.backing.as_ref().map(|name| match path.parent() {
                Some(folder) => folder.join(name),
                None => name.clone(),
            });
            match &mut mapping {
                None => {
                    mapping = Some(Mapping {
                        disk: layer.disk,
                        files: vec![path],
                        cluster_bits: layer.cluster_bits,
                        l2_tables: layer.l2_tables,
                    });
                }
                Some(above) => above.put_below(path, layer)?,
            }
        }
        Ok(mapping.expect("the first layer was loaded"))
    }

    fn put_below(&mut self, path: PathBuf, layer: Layer) -> Result<(), String> {
        if layer.disk != self.disk || layer.cluster_bits != self.cluster_bits {
            return Err(format!("{}: not of its overlay's shape", path.display()));
        }
        let file = u8::try_from(self.files.len()).map_err(|_| "more than 256 layers")?;
        self.files.push(path);
        for (above, below) in self.l2_tables.iter_mut().zip(layer.l2_tables) {
            let Some(below) = below else { continue };
            let len = below.len();
            let above = above.get_or_insert_with(|| vec![0; len].into_boxed_slice());
            for (above, below) in above.iter_mut().zip(below) {
                if *above == 0 && below != 0 {
                    *above = below | u64::from(file);
                }
            }
        }
        Ok(())
    }

    /// File of the chain and host offset of `guest`; `None` where no layer has data.
    #[inline]
    pub fn find(&self, guest: u64) -> Option<(usize, u64)> {
        let cluster = guest >> self.cluster_bits;
        let l2_bits = self.cluster_bits - 3;
        let table = self.l2_tables[index(cluster >> l2_bits)].as_ref()?;
        let entry = table[index(cluster & ((1 << l2_bits) - 1))];
        let within = guest & ((1 << self.cluster_bits) - 1);
        (entry != 0).then_some(((entry & 0xff) as usize, (entry & OFFSET) + within))
    }
}

#[inline]
fn index(number: u64) -> usize {
    usize::try_from(number).expect("tables in memory have indices that fit")
}

/// One image's own tables.
struct Layer {
    disk: u64,
    cluster_bits: u32,
    backing: Option<PathBuf>,
    l2_tables: Vec<Option<Box<[u64]>>>,
}

impl Layer {
    fn load(path: &Path) -> io::Result<Layer> {
        let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why.to_string());
        let file = File::open(path)?;
        let word = |at: u64| -> io::Result<u32> {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at)?;
            Ok(u32::from_be_bytes(bytes))
        };
        let long = |at: u64| -> io::Result<u64> {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at)?;
            Ok(u64::from_be_bytes(bytes))
        };
        // qcow2 specification, "Header": the fields by their offsets.
        if word(0)? != MAGIC {
            return Err(bad("not a qcow2 image"));
        }
        let backing = match (long(8)?, word(16)?) {
            (0, _) => None,
            (_, len) if len > 1023 => return Err(bad("name of the backing file is too long")),
            (at, len) => {
                let mut name = vec![0; len as usize];
                file.read_exact_at(&mut name, at)?;
                Some(PathBuf::from(OsStr::from_bytes(&name)))
            }
        };
        let (cluster_bits, disk, l1_entries) = (word(20)?, long(24)?, word(36)?);
        if !(9..=21).contains(&cluster_bits) || l1_entries > 4 << 20 {
            return Err(bad("cluster size or L1 size out of range"));
        }
        let table = |at: u64, entries: usize| -> io::Result<Box<[u64]>> {
            let mut bytes = vec![0; entries * 8];
            file.read_exact_at(&mut bytes, at)?;
            let entry = |b: &[u8]| u64::from_be_bytes(b.try_into().expect("chunks of eight"));
            Ok(bytes.chunks_exact(8).map(entry).collect())
        };
        let l2_table = |entry: &u64| match entry & OFFSET {
            0 => Ok(None),
            at => {
                let mut entries = table(at, 1 << (cluster_bits - 3))?;
                if entries.iter().any(|entry| entry & ODD != 0) {
                    return Err(bad("a cluster is compressed or all zeros"));
                }
                entries.iter_mut().for_each(|entry| *entry &= OFFSET);
                Ok(Some(entries))
            }
        };
        let l1_table = table(long(40)?, l1_entries as usize)?;
        let l2_tables = l1_table.iter().map(l2_table).collect::<io::Result<_>>()?;
        Ok(Layer {
            disk,
            cluster_bits,
            backing,
            l2_tables,
        })
    }
}
