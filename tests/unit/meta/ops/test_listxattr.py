from meta.harness import Meta, run, user


def test_names_are_in_order_and_those_of_root_hidden_from_others() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f", mode=0o600)
        await meta.create("/g")
        assert list((await meta.do("Listxattr", "/f")).names) == []
        wanted = [b"security.b", b"security.capability", b"security.d", b"trusted.a", b"user.z"]
        for name in reversed(wanted):
            await meta.do("Setxattr", "/f", name=name, value=bytes(20))
        await meta.do("Setxattr", "/g", name=b"user.other", value=b"")
        assert list((await meta.do("Listxattr", "/f")).names) == wanted
        shown = (await meta.do("Listxattr", "/f", caller=user(5))).names
        assert list(shown) == [name for name in wanted if not name.startswith(b"trusted.")]

    run(main())


def test_listings_of_directories_tell_who_has_attributes() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/with")
        await meta.create("/without")
        await meta.do("Setxattr", "/with", name=b"user.a", value=bytes(1000))
        page = await meta.do("List", "/", with_attr=True)
        assert [(e.name, e.attr.xattrs) for e in page.entries] == [(b"with", 1), (b"without", 0)]

    run(main())
