//! The structures of `ffi` against the headers of this machine, where it has them.

use crate::ffi::*;
use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};
use std::process::Command;

macro_rules! layout {
    ($($type:ident $(= $size:tt)? { $($field:ident $(as $path:literal)?),* })*) => {
        /// (C expression, value here).
        fn here() -> Vec<(String, usize)> {
            let mut all = Vec::new();
            $(
                $( let _: &str = $size; all.push((format!("sizeof(struct {})", stringify!($type)), size_of::<$type>())); )?
                $(
                    #[allow(unused_mut, unused_assignments)]
                    let mut path = stringify!($field);
                    $( path = $path; )?
                    all.push((format!("offsetof(struct {}, {path})", stringify!($type)), offset_of!($type, $field)));
                )*
            )*
            all
        }
    };
}

layout! {
    ibv_context { device, ops, cmd_fd, async_fd, num_comp_vectors }
    ibv_context_ops = "whole" { poll_cq, req_notify_cq, post_srq_recv, post_send, post_recv }
    ibv_device = "whole" { name, dev_name, transport_type }
    ibv_device_attr {
        max_qp_wr, max_sge, max_sge_rd, max_cqe, max_qp_rd_atom, max_qp_init_rd_atom, max_srq, max_srq_wr, phys_port_cnt
    }
    ibv_port_attr { state, active_mtu, max_msg_sz, lid, link_layer, port_cap_flags2 }
    ibv_mr = "whole" { lkey, rkey }
    ibv_comp_channel = "whole" { fd }
    ibv_cq { context, channel }
    ibv_srq { context }
    ibv_qp { context, qp_num }
    ibv_wc = "whole" { wr_id, status, opcode, byte_len }
    ibv_sge = "whole" { addr, length, lkey }
    ibv_send_wr = "whole" { next, sg_list, num_sge, opcode, send_flags, remote_addr as "wr.rdma.remote_addr", rkey as "wr.rdma.rkey" }
    ibv_recv_wr = "whole" { next, sg_list, num_sge }
    ibv_qp_init_attr = "whole" { srq, cap, qp_type, sq_sig_all }
    ibv_ah_attr = "whole" { grh, dlid, sl, is_global, port_num }
    ibv_global_route = "whole" { sgid_index, hop_limit, traffic_class }
    ibv_qp_attr = "whole" {
        path_mtu, rq_psn, sq_psn, dest_qp_num, qp_access_flags, ah_attr, pkey_index, max_rd_atomic, max_dest_rd_atomic,
        min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry
    }
    ibv_srq_init_attr = "whole" { attr }
    rdma_event_channel = "whole" { fd }
    rdma_cm_id { verbs }
    rdma_conn_param = "whole" {
        private_data, private_data_len, responder_resources, initiator_depth, retry_count, srq, qp_num
    }
    rdma_cm_event { id, listen_id, event, status, conn as "param.conn" }
}

#[test]
fn structures_are_laid_out_as_in_the_header() {
    for (header, package) in [("infiniband/verbs.h", "libibverbs-dev"), ("rdma/rdma_cma.h", "librdmacm-dev")] {
        if !std::path::Path::new("/usr/include").join(header).exists() {
            eprintln!("not compared: this machine has no {header} (package {package})");
            return;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let mut source = String::from(
        "#include <infiniband/verbs.h>\n#include <rdma/rdma_cma.h>\n#include <stdio.h>\n#include <stddef.h>\nint main() {\n",
    );
    for (expression, _) in here() {
        source += &format!("printf(\"%s=%zu\\n\", \"{expression}\", {expression});\n");
    }
    source += "}\n";
    let (file, program) = (dir.path().join("layout.c"), dir.path().join("layout"));
    std::fs::write(&file, source).unwrap();
    assert!(Command::new("cc").arg(&file).arg("-o").arg(&program).status().unwrap().success());
    let output = String::from_utf8(Command::new(&program).output().unwrap().stdout).unwrap();
    let there: BTreeMap<&str, usize> =
        output.lines().map(|line| line.rsplit_once('=').map(|(k, v)| (k, v.parse().unwrap())).unwrap()).collect();
    for (expression, value) in here() {
        assert_eq!(there[&*expression], value, "{expression}");
    }
    assert!(size_of::<ibv_device_attr>() >= 232 && size_of::<ibv_port_attr>() >= 52);
}
