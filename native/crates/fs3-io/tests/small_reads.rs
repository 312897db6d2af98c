//! Small reads that are not cached, many at once, on a real disk.

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::{CHUNK, bytes_of, id, options, pattern, update, write};
use fs3_core::{Code, UpdateVersion};
use fs3_io::{IoThreads, TargetStore};

const CHUNKS: u32 = 4;

#[test]
fn many_small_reads_get_the_right_bytes_and_rot_is_found() {
    let options = options(&IoThreads::new(2));
    let dir = tempfile::tempdir().unwrap();
    let store = TargetStore::open(dir.path(), options.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        for chunk in 0..CHUNKS {
            store.prepare(update(chunk, 1, write(0, pattern(2 * u64::from(chunk) + 1, 0, CHUNK)))).await.unwrap();
            store.commit(id(chunk), UpdateVersion(1)).await.unwrap();
            // Over some blocks lies a patch that is not in its place yet.
            store.prepare(update(chunk, 2, write(40_960, vec![chunk as u8; 4096]))).await.unwrap();
            store.commit(id(chunk), UpdateVersion(2)).await.unwrap();
        }
        let readers: Vec<_> = (0..8u32)
            .map(|reader| {
                let (store, cache) = (store.clone(), options.read_cache.clone());
                tokio::spawn(async move { read_some(&store, reader, || cache.clear()).await })
            })
            .collect();
        for reader in readers {
            reader.await.unwrap();
        }
        // One flipped bit in the data file.
        let file = std::fs::OpenOptions::new().read(true).write(true).open(dir.path().join("data.18.blk")).unwrap();
        let wanted = &pattern(3, 0, CHUNK)[8192..12_288];
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let at = bytes.chunks(4096).position(|block| block == wanted).unwrap() * 4096 + 100;
        file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
        file.sync_all().unwrap();
        options.read_cache.clear();
        assert_eq!(store.read(id(1), 8192, 4096).await.err().map(|e| e.code), Some(Code::ChecksumMismatch));
        assert!(store.chunk(id(1)).unwrap().rotten);
        // A data file that became too short is an error of the disk.
        file.set_len(0).unwrap();
        options.read_cache.clear();
        assert_eq!(store.read(id(0), 8192, 4096).await.err().map(|e| e.code), Some(Code::DiskError));
        assert!(store.failed().is_some());
    });
}

async fn read_some(store: &Arc<TargetStore>, reader: u32, forget: impl Fn()) {
    let contents: Vec<Vec<u8>> = (0..CHUNKS)
        .map(|chunk| {
            let mut content = pattern(2 * u64::from(chunk) + 1, 0, CHUNK);
            content[40_960..45_056].fill(chunk as u8);
            content
        })
        .collect();
    for i in 0..300u32 {
        let mixed = (i * 8 + reader).wrapping_mul(2_654_435_761) >> 7;
        let (chunk, block) = (mixed % CHUNKS, mixed / CHUNKS % (CHUNK / 4096));
        let blocks = (1 + mixed % 16).min(CHUNK / 4096 - block);
        if i % 4 == 0 {
            forget();
        }
        let out = store.read(id(chunk), block * 4096, blocks * 4096).await.unwrap();
        let range = (block * 4096) as usize..((block + blocks) * 4096) as usize;
        assert!(bytes_of(&out) == contents[chunk as usize][range], "chunk {chunk} block {block}");
    }
}
