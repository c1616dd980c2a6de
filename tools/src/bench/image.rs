//! The image that a job runs on: one that is there, or one that it makes and removes.

use std::path::Path;

use rustix::fs::FallocateFlags;

use super::cli::{Config, Pattern};
use crate::output::{Output, os_message};
use crate::spec::{ImageSpec, Naming, could_not_open};

/// Size of an image that we make, unless told otherwise.
const SIZE_DEFAULT: u64 = 1 << 30;
/// The same of one with a backing file.
const SIZE_WITH_BACKING: u64 = 256 << 20;
/// Clusters of an overlay: its tables are many, and the shortest writes do not fill a cluster.
const SMALL_CLUSTER: u64 = 8 << 10;

/// The image that the job runs on.
pub struct Image {
    /// How it is opened.
    pub spec: ImageSpec,
    /// For messages.
    pub path: String,
    /// Made by us, all zero but for what its backing file holds.
    pub new: bool,
    /// An empty image that is below it.
    pub backing: Option<ImageSpec>,
    /// Where it is, if it is temporary.
    folder: Option<tempfile::TempDir>,
}

impl Image {
    /// Finds or makes it.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub fn prepare(config: &Config) -> Result<Self, String> {
        match &config.image {
            Some(path) => Self::existing(config, path),
            None => Self::make(config),
        }
    }

    fn existing(config: &Config, path: &Path) -> Result<Self, String> {
        let shown = path.to_string_lossy().into_owned();
        if config.rw.writes() && !config.allow_write {
            return Err(format!(
                "{shown}: --rw={} would overwrite it; give --allow-write if that is what you want",
                config.rw.name()
            ));
        }
        let naming = Naming {
            image_opts: false,
            format: config.format.as_deref(),
        };
        let spec =
            ImageSpec::new(path.as_os_str(), naming).map_err(|why| could_not_open(&shown, &why))?;
        if spec.probed && spec.driver() == "raw" && config.rw.writes() {
            return Err(format!(
                "{shown}: it looks like a raw image; give --format=raw if it is one"
            ));
        }
        Ok(Self {
            spec,
            path: shown,
            new: false,
            backing: None,
            folder: None,
        })
    }

    fn make(config: &Config) -> Result<Self, String> {
        let size = config.size.unwrap_or(match config.backing {
            true => SIZE_WITH_BACKING,
            false => SIZE_DEFAULT,
        });
        let block = config.block_size as u64;
        if size == 0 || !size.is_multiple_of(block) {
            return Err(format!(
                "--size={size} is not a multiple of --bs={block}, and above zero"
            ));
        }
        let folder = tempfile::Builder::new()
            .prefix("coblock-bench-")
            .tempdir()
            .map_err(|error| format!("temporary folder: {}", os_message(&error)))?;
        let format = config.format.as_deref().unwrap_or("qcow2");
        let path = folder
            .path()
            .join(format!("image.{format}"))
            .to_string_lossy()
            .into_owned();
        let make = |path: &str, options: &[(&str, &str)]| {
            crate::img::make_image(path, format, size, options)
                .map_err(|why| format!("{path}: {why}"))
        };
        let mut spec = ImageSpec::file(&path, format);
        if config.rw == Pattern::Mixed {
            spec.keys.set("discard", "unmap");
        }
        let mut backing = None;
        if config.backing {
            let below = folder.path().join("backing.qcow2");
            let below = below.to_string_lossy().into_owned();
            make(&below, &[])?;
            let cluster_size = SMALL_CLUSTER.to_string();
            let options = [
                ("backing_file", below.as_str()),
                ("backing_fmt", format),
                ("cluster_size", &cluster_size),
            ];
            make(&path, &options)?;
            // Holes in the file take long, and their clusters are not free before: reuse of freed
            // clusters, which is what goes wrong, would be rare.
            spec.keys.set("pass-discard-request", "off");
            backing = Some(ImageSpec::file(&below, format));
        } else {
            make(&path, &[])?;
        }
        Ok(Self {
            spec,
            path,
            new: true,
            backing,
            folder: Some(folder),
        })
    }

    /// Removes a temporary image.
    ///
    /// Random writes leave a file of many small extents. Where the file system discards freed
    /// blocks at once, each of them would cost a command to the disk, which takes minutes for a
    /// gigabyte; unwritten extents merge, so that first.
    pub fn remove(self, out: &Output) {
        let Some(folder) = self.folder else { return };
        if let Ok(file) = std::fs::OpenOptions::new().write(true).open(&self.path)
            && let Ok(metadata) = file.metadata()
            && metadata.len() > 0
        {
            // Only to be quicker: a file system that cannot do it removes the file as it is.
            let _ = rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 0, metadata.len());
        }
        let path = folder.path().to_string_lossy().into_owned();
        if let Err(error) = folder.close() {
            out.warning(format!(
                "{path} could not be removed: {}",
                os_message(&error)
            ));
        }
    }
}
